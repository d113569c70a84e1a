"""Tool calls in model text: found in each format, whole and in any pieces; all else is text."""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisrv.checkpoint.chat_format import ToolFormat
from minisrv.frontend.tool_calls.formats import PARSERS, CallReading, make_call_id
from minisrv.frontend.tool_calls.parser import MAY_BECOME, CallParser, State
from minisrv.frontend.tool_calls.pieces import Piece, Text, ToolCallArguments, ToolCallStart

Call = tuple[str, str]
JSON_FORMATS: tuple[ToolFormat, ...] = ("hermes", "llama", "mistral", "deepseek")
FORMATS: tuple[ToolFormat, ...] = (*JSON_FORMATS, "qwen3_coder", "glm")
NAMES = ("f", "get_time")
# What is not in it may be of any type.
SCHEMAS = {name: {"properties": {"s": {"type": "string"}}} for name in NAMES}
F = '{"name": "f", "arguments": {"a": "} ] \\" \\\\"}}'
F_ARGUMENTS = '{"a": "} ] \\" \\\\"}'


def read(
    tool_format: ToolFormat, pieces: Sequence[str], parallel: bool = True
) -> tuple[str, list[Call], bool]:
    """The content, the calls and whether the last is whole. Holds the order of the pieces."""
    parser = CallReading(tool_format=tool_format, schemas=SCHEMAS, parallel=parallel).make_parser()
    got = [piece for delta in pieces for piece in parser.push(delta)] + parser.flush()
    text, calls = "", list[Call]()
    for piece in got:
        if isinstance(piece, Text):
            assert piece.text
            text += piece.text
        elif isinstance(piece, ToolCallStart):
            assert piece.index == len(calls)
            calls.append((piece.name, ""))
        else:
            assert piece.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    assert parser.num_calls == len(calls)
    return text, calls, parser.whole


ONE = [("f", '{"x": 1}')]
EMPTY = ("f", "{}")
BARE = '{"name": "f", "parameters": {}}'
QWEN = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
GLM = "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
DEEPSEEK = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"x": 1}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
FENCED = re.sub(
    r"f<｜tool▁sep｜>(\{.*?\})", r"function<｜tool▁sep｜>f\n```json\n\1\n```", DEEPSEEK
).replace("end｜><｜tool▁call▁b", "end｜>\n<｜tool▁call▁b")
SPELLINGS: list[tuple[ToolFormat, str, str, list[Call]]] = [
    ("hermes", f"<tool_call>\n{F}\n</tool_call>", "", [("f", F_ARGUMENTS)]),
    ("hermes", f"Let me.\n\n<tool_call>{F}</tool_call>\n", "Let me.", [("f", F_ARGUMENTS)]),
    ("hermes", f"<tool_call>{F}</tool_call>\n" * 2, "", [("f", F_ARGUMENTS)] * 2),
    ("hermes", f"<tool_call>{F} and more", "and more", [("f", F_ARGUMENTS)]),
    ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "g"}', "", [("g", '{"x": 1}')]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [EMPTY]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}', "", [("f", '{"x": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}, "id": 3}', "", ONE),
    ("llama", '{"name": "f", "parameters": {"x": 1}}', "", ONE),
    ("llama", '<|python_tag|>{"name": "any", "parameters": {}}', "", [("any", "{}")]),
    ("llama", f"{BARE}; {BARE}", "", [EMPTY] * 2),
    ("llama", f"{BARE}\n<|python_tag|>{BARE}", "", [EMPTY] * 2),
    ("llama", '{"type": "function", "name": "f", "parameters": {}}', "", [EMPTY]),
    ("llama", '{"type": "function", "function": "f", "parameters": {}}', "", [EMPTY]),
    ("mistral", f"[TOOL_CALLS] [{F}, {F}]", "", [("f", F_ARGUMENTS)] * 2),
    ("mistral", f"[TOOL_CALLS]{F}", "", [("f", F_ARGUMENTS)]),
    ("mistral", 'Yes.[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]f[ARGS]{}', "Yes.", [*ONE, EMPTY]),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]Ab3[ARGS] {"x": 1}', "", ONE),
    ("mistral", '[TOOL_CALLS]f{"x": 1}', "", ONE),
    ("qwen3_coder", f"Yes.\n{QWEN}\n{QWEN}", "Yes.", [*ONE, *ONE]),
    ("qwen3_coder", QWEN.removeprefix("<tool_call>\n"), "", ONE),
    ("qwen3_coder", f"{QWEN.removesuffix('</tool_call>')} and more", "and more", ONE),
    ("qwen3_coder", "<tool_call><function=f></function></tool_call>", "", [EMPTY]),
    ("qwen3_coder", "<function=f>\n<parameter=x>1</parameter>\n</tool_call>", "", ONE),
    (
        "qwen3_coder",
        "<function=f>\n<parameter=s>\n\n</parameter>\nx\n\n</parameter>\n</function>",
        "",
        [("f", '{"s": "\\n</parameter>\\nx\\n"}')],
    ),
    ("glm", f"Yes.\n{GLM}{GLM}", "Yes.", [*ONE, *ONE]),
    ("glm", GLM.replace("\n", ""), "", ONE),
    ("glm", "<tool_call>f</tool_call>", "", [EMPTY]),
    (
        "glm",
        "<tool_call>f<arg_key>a</arg_key>?<arg_key>s</arg_key> <arg_value> </arg_value> "
        "</arg_value><arg_key>b</arg_key><arg_value>[]</arg_value></tool_call>",
        "",
        [("f", '{"s": " </arg_value> ", "b": []}')],
    ),
    ("deepseek", f"Yes.{DEEPSEEK}", "Yes.", [*ONE, EMPTY]),
    ("deepseek", DEEPSEEK.removeprefix("<｜tool▁calls▁begin｜>"), "", [*ONE, EMPTY]),
    ("deepseek", FENCED, "", [*ONE, EMPTY]),
    ("deepseek", FENCED.removesuffix("<｜tool▁calls▁end｜>"), "", [*ONE, EMPTY]),
    ("deepseek", FENCED.replace("json\n", ""), "", [*ONE, EMPTY]),
]


@pytest.mark.parametrize(("tool_format", "reply", "text", "calls"), SPELLINGS)
def test_a_call_is_found_in_each_spelling(
    tool_format: ToolFormat, reply: str, text: str, calls: list[Call]
) -> None:
    assert read(tool_format, [reply]) == (text, calls, True)
    assert read(tool_format, list(reply)) == (text, calls, True)


NO_CALLS: list[tuple[ToolFormat, str]] = [
    ("hermes", "The <tool_call> tag opens a call, </tool_call> closes it."),
    ("hermes", "<tool_call>\n{not json}\n</tool_call>  "),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", "a <tool_cal"),
    ("hermes", F),
    ("llama", '  {"name": "unknown", "parameters": {"x": 1}} '),
    ("llama", '{"title": "f", "parameters": {"x": 1}}'),
    ("llama", f"As JSON: {F}"),
    ("llama", "<|python_tag|>print(1)"),
    ("llama", "{}"),
    ("mistral", "[TOOL_CALLS] is how a call begins"),
    ("mistral", "[TOOL_CALLS] [1, 2]"),
    ("mistral", "[TOOL_CALLS]f[ARGS] [1]"),
    ("mistral", "[TOOL"),
    ("mistral", F),
    ("qwen3_coder", "Use <tool_call> and <function=name> for it."),
    ("qwen3_coder", "<function=f>\nprint(1)"),
    ("qwen3_coder", "<function=f><x><parameter=x>1</parameter></function>"),
    ("qwen3_coder", f"<tool_call>\n{F}\n</tool_call>"),
    ("qwen3_coder", "<tool_call>\n<function=f"),
    ("glm", "<tool_call> is a tag"),
    ("glm", "<tool_call>f(1)</tool_call>"),
    ("glm", f"<tool_call>\n{F}\n</tool_call>"),
    ("glm", "<tool_call>f\n<arg_"),
    ("deepseek", "<｜tool▁calls▁begin｜>nothing"),
    ("deepseek", "<｜tool▁call▁begin｜>f<b>"),
    ("deepseek", "<｜tool▁call▁begin｜>f\n<｜tool▁sep｜>{}"),
    ("deepseek", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```python\n{}```"),
    ("deepseek", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n[]```"),
]


@pytest.mark.parametrize(("tool_format", "reply"), NO_CALLS)
def test_what_only_looks_like_a_call_stays_text(tool_format: ToolFormat, reply: str) -> None:
    assert read(tool_format, [reply]) == (reply, [], True)
    assert read(tool_format, list(reply)) == (reply, [], True)


def test_arguments_are_passed_on_as_they_come() -> None:
    parser = CallReading(tool_format="hermes", schemas=SCHEMAS).make_parser()
    assert parser.push('<tool_call>\n{"name": "get_time", "arg') == []
    (start, first) = parser.push('uments": {"zone"')
    assert isinstance(start, ToolCallStart)
    assert (start.index, start.name) == (0, "get_time")
    assert first == ToolCallArguments(0, '{"zone"')
    assert [piece.text for piece in parser.push(': "CET"')] == [': "CET"']  # type: ignore[union-attr]
    assert not parser.whole
    assert [piece.text for piece in parser.push("}}\n</tool")] == ["}"]  # type: ignore[union-attr]
    assert parser.push("_call>") == parser.flush() == []
    assert parser.whole


@pytest.mark.parametrize("cut", range(1, 52))
def test_a_call_that_breaks_off_is_text_before_its_arguments_and_open_in_them(cut: int) -> None:
    reply = '<tool_call>\n{"name": "f", "arguments": {"x": 12345}'[:cut]
    text, calls, whole = read("hermes", [reply])
    if cut <= 39:
        assert (text, calls) == (reply, [])
    else:
        assert (text, calls) == ("", [("f", reply[39:])])
        assert whole == (cut == len('<tool_call>\n{"name": "f", "arguments": {"x": 12345}'))


CUT_OFF = {
    "hermes": f"Yes.\n<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{F}\n</tool_call>",
    "llama": '{"name": "f", "parameters": {"x": 1}}; {"name": "f", "parameters": {"x": 1}}',
    "mistral": 'Yes.[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]f[ARGS]{"x": 1}',
    "mistral list": f"Yes.[TOOL_CALLS] [{F}, {F}]",
    "llama by keys": '{"type": "function", "parameters": {"x": [1]}, "name": "f"}',
    "qwen3_coder": f"Yes.\n{QWEN}\n{QWEN}",
    "glm": f"Yes.\n{GLM}\n{GLM}",
    "deepseek": f"Yes.{DEEPSEEK}",
    "deepseek fenced": FENCED,
    "llama mark": '<|python_tag|>{"name": "any", "parameters": {"x": 1}}',
}


@pytest.mark.parametrize("form", CUT_OFF)
def test_a_call_is_never_content_wherever_the_reply_is_cut_off(form: str) -> None:
    reply = CUT_OFF[form]
    content = "Yes." if reply.startswith("Yes.") else ""
    for end in range(len(content), len(reply) + 1):
        parser = CallReading(tool_format=form.split()[0], schemas=SCHEMAS).make_parser()  # type: ignore[arg-type]
        pieces = parser.push(reply[:end]) + parser.flush(cut_off=True)
        text = "".join(piece.text for piece in pieces if isinstance(piece, Text))
        assert text.rstrip() == content
        assert parser.lost_call <= parser.whole


@pytest.mark.parametrize(
    "reply",
    [
        '{"name": "Bob", "arguments": [1',
        '{"name": "f", "age": 5, "arguments": ["',
        '{"name": 5',
        '{"type": "function", "function": "Bob", "parameters": "a',
    ],
)
def test_json_that_cannot_become_a_call_is_content_where_it_is_cut_off(reply: str) -> None:
    parser = CallReading(tool_format="llama", schemas=SCHEMAS).make_parser()
    assert parser.push(reply) + parser.flush(cut_off=True) == [Text(reply)]
    assert not parser.lost_call


@pytest.mark.parametrize("tool_format", FORMATS)
def test_without_parallel_calls_the_reply_ends_with_the_first(tool_format: ToolFormat) -> None:
    one = '{"name": "f", "parameters": {}}'
    reply = {
        "hermes": f"a<tool_call>{one}</tool_call><tool_call>{one}</tool_call> text",
        "llama": f"{one}; {one} text",
        "mistral": f"[TOOL_CALLS] [{one}, {one}] text",
        "qwen3_coder": f"{QWEN}\n{QWEN} text",
        "glm": f"{GLM}\n{GLM} text",
        "deepseek": f"{DEEPSEEK} text",
    }[tool_format]
    text, calls, whole = read(tool_format, list(reply), parallel=False)
    expected = ONE[0] if tool_format in ("qwen3_coder", "glm", "deepseek") else EMPTY
    assert (text, calls, whole) == ("a" * (tool_format == "hermes"), [expected], True)


def test_call_ids_are_what_templates_take() -> None:
    for tool_format in JSON_FORMATS:
        parser = CallReading(tool_format=tool_format, schemas=SCHEMAS).make_parser()
        pieces = parser.push(write(tool_format, "", [("f", {}), ("f", {})], ascii=True))
        ids = {piece.id for piece in pieces if isinstance(piece, ToolCallStart)}
        assert [len(id) for id in ids] == [9 if tool_format == "mistral" else 29] * 2
    assert make_call_id("hermes").startswith("call_")
    assert len(make_call_id("llama")) == 29
    assert len(make_call_id("mistral")) == 9
    assert make_call_id("mistral").isalnum()


MARKS = [
    *["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
    *['{"name": "f", "arguments": ', '{"name": "f", "parameters": {', "f", "\n", " ", *'{}"\\[],;'],
    *["e\u0301", "\U0001f468\u200d\U0001f469", "\u4f60\u597d"],
]
TAGS = [
    *[
        "<tool_call>",
        "</tool_call>",
        "<function=f>",
        "</function>",
        "<parameter=s>",
        "\n",
        " ",
        "<",
    ],
    *["</parameter>", "<arg_key>", "s", "x", "</arg_key>", "<arg_value>", "</arg_value>", "5", ">"],
    *[
        QWEN[:-12],
        GLM,
        "<tool_call>f",
        "<arg_key>s</arg_key><arg_value>",
        "<parameter=x>\n",
        "\u4f60",
    ],
]
TOKENS = [
    *["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"],
    *[
        "<｜tool▁calls▁end｜>",
        "f",
        "function",
        "{}",
        '{"x": "',
        '"}',
        "\n",
        "```json",
        "```",
        " ",
        "<",
    ],
]
PARTS: dict[ToolFormat, list[str]] = {"qwen3_coder": TAGS, "glm": TAGS, "deepseek": TOKENS}


def any_reply(tool_format: ToolFormat) -> st.SearchStrategy[str]:
    part = st.sampled_from(PARTS.get(tool_format, MARKS)) | st.text(max_size=3)
    return st.lists(part, max_size=12).map("".join)


CONTENT = st.text(st.sampled_from("ab \n\u4f60\u0301\U0001f600<[{|}]"), max_size=12)
KEYS = st.text(max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=5,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=6), JSON, max_size=3)),
    min_size=1,
    max_size=3,
)


def cut(text: str, borders: list[int]) -> list[str]:
    places = sorted({border % (len(text) + 1) for border in borders})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def joined_pieces(tool_format: ToolFormat, deltas: Sequence[str], parallel: bool) -> list[Piece]:
    """The pieces, each run of texts or arguments joined to one; ids are numbered."""
    numbers = map(str, itertools.count())
    parser = PARSERS[tool_format](SCHEMAS, numbers.__next__, parallel)
    pieces: list[Piece] = []
    for piece in [*itertools.chain(*map(parser.push, deltas)), *parser.flush()]:
        last = pieces[-1] if pieces else None
        if isinstance(piece, Text) and isinstance(last, Text):
            pieces[-1] = Text(last.text + piece.text)
        elif isinstance(piece, ToolCallArguments) and isinstance(last, ToolCallArguments):
            assert piece.index == last.index
            pieces[-1] = ToolCallArguments(piece.index, last.text + piece.text)
        else:
            pieces.append(piece)
    return pieces


@pytest.mark.parametrize("tool_format", FORMATS)
@settings(max_examples=80, deadline=None)
@given(data=st.data(), borders=st.lists(st.integers(0, 1000), max_size=20), parallel=st.booleans())
def test_where_the_text_is_cut_changes_nothing(
    tool_format: ToolFormat, data: st.DataObject, borders: list[int], parallel: bool
) -> None:
    reply = data.draw(any_reply(tool_format))
    whole = read(tool_format, [reply], parallel)
    pieces = joined_pieces(tool_format, [reply], parallel)
    for deltas in (cut(reply, borders), list(reply)):
        assert read(tool_format, deltas, parallel) == whole
        assert joined_pieces(tool_format, deltas, parallel) == pieces


def test_replies_take_every_transition_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = set[tuple[State, State]]()
    become = CallParser._become

    def record(parser: CallParser, state: State) -> None:
        taken.add((parser.state, state))
        become(parser, state)

    monkeypatch.setattr(CallParser, "_become", record)
    replies = [(spelling[0], spelling[1]) for spelling in SPELLINGS] + NO_CALLS
    for (tool_format, reply), parallel in itertools.product(replies, (True, False)):
        read(tool_format, [reply], parallel)
    assert taken == {(state, next) for state, following in MAY_BECOME.items() for next in following}


def test_a_transition_outside_of_the_table_is_an_assertion() -> None:
    parser = CallReading(tool_format="hermes", schemas=SCHEMAS).make_parser()
    with pytest.raises(AssertionError):
        parser._become(State.ARGUMENTS)


def write(tool_format: ToolFormat, content: str, calls: list[tuple[str, Any]], ascii: bool) -> str:
    written = [json.dumps(arguments, ensure_ascii=ascii) for _, arguments in calls]
    names = [name for name, _ in calls]
    key = "parameters" if tool_format == "llama" else "arguments"
    objects = [
        f'{{"name": "{name}", "{key}": {text}}}' for name, text in zip(names, written, strict=True)
    ]
    if tool_format == "hermes":
        return content + "".join(f"\n<tool_call>\n{text}\n</tool_call>" for text in objects)
    if tool_format == "llama":
        return content + "<|python_tag|>" + "; ".join(objects)
    if tool_format == "deepseek":
        return content + "".join(
            f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{text}<｜tool▁call▁end｜>"
            for name, text in zip(names, written, strict=True)
        )
    if ascii:
        return f"{content}[TOOL_CALLS] [{', '.join(objects)}]"
    return content + "".join(
        f"[TOOL_CALLS]{name}[ARGS]{text}" for name, text in zip(names, written, strict=True)
    )


@settings(max_examples=120)
@given(st.sampled_from(JSON_FORMATS), CONTENT, CALLS, st.booleans(), st.lists(st.integers(0, 1000)))
def test_calls_that_were_written_are_read(
    tool_format: ToolFormat,
    content: str,
    calls: list[tuple[str, Any]],
    ascii: bool,
    borders: list[int],
) -> None:
    reply = write(tool_format, content, calls, ascii)
    text, got, whole = read(tool_format, cut(reply, borders))
    assert (text, whole) == (content.rstrip(), True)
    assert [(name, json.loads(arguments)) for name, arguments in got] == calls
