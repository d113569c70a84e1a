"""Grammars of whole replies: what they take and refuse, read by the parsers that read replies."""

import itertools
import json
from typing import Any

import pytest
from tokenizers import AddedToken

from minisrv.checkpoint.chat_format import find_chat_format
from minisrv.checkpoint.tokenizer import HFTokenizer
from minisrv.frontend.tool_calls.formats import CallReading
from minisrv.frontend.tool_calls.pieces import ToolCallArguments, ToolCallStart
from minisrv.sampling_params import Grammar
from minisrv.structured_output.checker import check
from minisrv.structured_output.source import to_source
from minisrv.structured_output.vocabulary import Vocabulary, read_vocabulary
from minisrv.tokenizer.reply_grammar import ReplyGrammars
from minisrv.wire.messages import Parts
from tests.support import own_tokenizers

TEMPLATES = {
    "hermes": "{{ tools }}<tool_call></tool_call></think>",
    "llama": "{{ tools }}<|python_tag|>",
    "mistral list": "{{ tools }}[TOOL_CALLS]",
    "mistral": "{{ tools }}[TOOL_CALLS]x[ARGS][THINK][/THINK]",
    "qwen3_coder": "{{ tools }}<tool_call><function=></think>",
    "glm": "{{ tools }}<tool_call>x\n<arg_key></arg_key>\n<arg_value></think>",
    "glm without tokens": "{{ tools }}<tool_call>x<arg_key></arg_key><arg_value>",
    "deepseek": "{{ tools }}<｜tool▁calls▁begin｜><｜tool▁sep｜>",
    "deepseek fenced": "{{ tools }}<｜tool▁calls▁begin｜>```json",
}
SPECIAL = ["<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
ADD = '{"a": 1, "b": 22}'


class Replies:
    """The grammars of one model, and which replies they take."""

    def __init__(self, template: str) -> None:
        backend = own_tokenizers.byte_level_bpe()
        backend.add_special_tokens(SPECIAL)
        tags = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
        if template == "glm":
            tags += ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
        if template == "deepseek":
            tags += ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"]
            tags += ["<｜tool▁call▁end｜>", "<｜tool▁sep｜>"]
        backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
        named = dict(own_tokenizers.NAMED)
        self.tokenizer = HFTokenizer(backend, named, {"default": TEMPLATES[template]})
        self.chat_format = find_chat_format(self.tokenizer.chat_templates)
        self.vocabulary = Vocabulary(
            read_vocabulary(self.tokenizer, self.tokenizer.vocab_size, [2])
        )
        self.grammars = ReplyGrammars(self.tokenizer, self.chat_format)

    def takes(self, grammar: Grammar, reply: str) -> bool:
        """Whether `reply` may be the whole. Raises AssertionError where it cannot even begin so."""
        check(grammar, self.vocabulary)
        matcher = self.vocabulary.compile(to_source(grammar))
        for token_id in self.tokenizer.encode(reply, add_special_tokens=False):
            matcher.advance(token_id)
            assert matcher.error is None, matcher.error
        return matcher.accepts


def write(template: str, *calls: tuple[str, str]) -> str:
    objects = [f'{{"name": "{name}", "arguments": {text}}}' for name, text in calls]
    if template == "hermes":
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects)
    if template == "llama":
        return "; ".join(objects).replace('"arguments"', '"parameters"')
    if template == "mistral list":
        return f"[TOOL_CALLS] [{', '.join(objects)}]"
    if template.startswith("deepseek"):
        written = [f"{name}<｜tool▁sep｜>{text}" for name, text in calls]
        if template == "deepseek fenced":
            written = [
                f"function<｜tool▁sep｜>{name}\n```json\n{text}\n```" for name, text in calls
            ]
        line = "\n" if template == "deepseek fenced" else ""
        marked = [f"<｜tool▁call▁begin｜>{text}<｜tool▁call▁end｜>" for text in written]
        return f"<｜tool▁calls▁begin｜>{line.join(marked)}<｜tool▁calls▁end｜>"
    if template.startswith(("qwen", "glm")):
        return "\n".join(write_tags(template, name, json.loads(text)) for name, text in calls)
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{text}" for name, text in calls)


def write_tags(template: str, name: str, arguments: Any) -> str:
    values = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in (arguments.items() if isinstance(arguments, dict) else [])
    }
    if template == "qwen3_coder":
        parts = [f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in values.items()]
        return f"<tool_call>\n<function={name}>\n{''.join(parts)}</function>\n</tool_call>"
    line = "\n" if template == "glm" else ""
    parts = [
        f"<arg_key>{key}</arg_key>{line}<arg_value>{text}</arg_value>{line}"
        for key, text in values.items()
    ]
    return f"<tool_call>{name}{line}{''.join(parts)}</tool_call>"


@pytest.fixture(scope="module", params=TEMPLATES)
def template(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def replies(template: str) -> Replies:
    return Replies(template)


def test_one_call_or_with_parallel_several_are_taken(replies: Replies, template: str) -> None:
    one, two = (("add", ADD),), (("add", ADD), ("now", '{"zone": [null]}'))
    for parallel, calls in itertools.product((True, False), (one, two)):
        grammar = replies.grammars.calls(TOOLS, ("add", "now"), parallel)
        reply = write(template, *calls)
        if parallel or calls == one:
            assert replies.takes(grammar, reply)
        else:
            with pytest.raises(AssertionError):
                replies.takes(grammar, reply)


def test_what_is_taken_is_read_as_that_call(replies: Replies, template: str) -> None:
    reply = write(template, ("add", ADD))
    tool_format = replies.chat_format.tool_format
    assert tool_format is not None
    parser = CallReading(tool_format=tool_format, schemas={"add": None, "now": None}).make_parser()
    start, *rest = parser.push(reply) + parser.flush()
    assert isinstance(start, ToolCallStart)
    assert (start.index, start.name) == (0, "add")
    assert all(isinstance(piece, ToolCallArguments) for piece in rest)
    assert "".join(piece.text for piece in rest) == ADD  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("add", '{"a": 1}'),
        ("add", '{"a": "x", "b": 2}'),
        ("sub", ADD),
        ("now", "[]"),
        ("now", "{}"),
    ],
)
def test_other_names_and_arguments_are_refused(
    replies: Replies, template: str, name: str, arguments: str
) -> None:
    """The tool `now` is not among the names that may be called."""
    grammar = replies.grammars.calls(TOOLS, ("add",), True)
    with pytest.raises(AssertionError):
        replies.takes(grammar, write(template, (name, arguments)))


def test_text_and_an_empty_reply_are_not_calls(replies: Replies) -> None:
    grammar = replies.grammars.calls(TOOLS, ("add", "now"), True)
    assert not replies.takes(grammar, "")
    with pytest.raises(AssertionError):
        replies.takes(grammar, "Hello")


def test_a_reply_is_text_of_a_grammar_or_calls(replies: Replies, template: str) -> None:
    text = Grammar.json_schema({"const": 5})
    one, two = (("add", ADD),), (("add", ADD), ("now", "{}"))
    for parallel in (True, False):
        grammar = replies.grammars.or_calls(text, TOOLS, parallel)
        assert replies.takes(grammar, "5")
        assert replies.takes(grammar, write(template, *one))
        refused = ["6", "Hello", write(template, ("sub", ADD)), "5" + write(template, *one)]
        for reply in refused if parallel else [*refused, write(template, *two)]:
            with pytest.raises(AssertionError):
                replies.takes(grammar, reply)
    assert replies.takes(replies.grammars.or_calls(text, TOOLS, True), write(template, *two))


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar.json_schema({"type": "object", "required": ["a"]}),
        Grammar.regex(r'\{"a": [1-9]\}'),
        Grammar.choice(['{"a": 1}', "no"]),
        Grammar.lark('start: "{" thought "}"\nthought: "\\"a\\": 1"'),
    ],
)
@pytest.mark.parametrize("name", ["hermes", "mistral"])
def test_a_grammar_begins_behind_the_thought(grammar: Grammar, name: str) -> None:
    replies = Replies(name)
    begin, end = replies.chat_format.reasoning_markers or ("", "")
    text, thought = '{"a": 1}', 'hm "}" <b>\n\u4f60\n'
    may = replies.grammars.behind_reasoning(grammar, Parts.REASONING)
    assert replies.takes(may, text)
    assert replies.takes(may, f"{begin}\n{thought}{end}\n\n{text}")
    assert not replies.takes(may, f"{begin}\n{thought}")
    with pytest.raises(AssertionError):
        replies.takes(may, f"{begin}\n{thought}{end}\n\nHello")
    is_open = replies.grammars.behind_reasoning(grammar, Parts.OPEN_REASONING)
    assert replies.takes(is_open, f"{thought}{end}\n\n{text}")
    assert not replies.takes(is_open, text)
    assert replies.grammars.behind_reasoning(grammar, Parts.CALLS) == grammar


def test_calls_may_come_behind_a_thought() -> None:
    replies = Replies("hermes")
    calls = replies.grammars.calls(TOOLS, ("add",), parallel=False)
    grammar = replies.grammars.behind_reasoning(calls, Parts.REASONING | Parts.CALLS)
    call = write("hermes", ("add", ADD))
    assert replies.takes(grammar, f"<think>\nhm\n</think>\n\n{call}")
    assert replies.takes(grammar, call)
    assert json.loads(ADD) == {"a": 1, "b": 22}


@pytest.mark.parametrize("name", ["hermes", "mistral"])
def test_text_or_calls_come_behind_a_thought(name: str) -> None:
    replies = Replies(name)
    begin, end = replies.chat_format.reasoning_markers or ("", "")
    either = replies.grammars.or_calls(Grammar.regex("yes|no"), TOOLS, parallel=True)
    grammar = replies.grammars.behind_reasoning(either, Parts.REASONING | Parts.CALLS)
    for reply in ("yes", write(name, ("add", ADD))):
        assert replies.takes(grammar, reply)
        assert replies.takes(grammar, f"{begin}hm{end}\n\n{reply}")
    with pytest.raises(AssertionError):
        replies.takes(grammar, f"{begin}hm{end}\n\nmaybe")
