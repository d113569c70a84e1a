"""Each way in which a text ends, told alike in streams, in whole answers and offline.

The demo model runs behind the application; biases make it say what ends the text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState

from minisrv.llm import LLM
from minisrv.sampling_params import Grammar, SamplingParams, TokenBias
from minisrv.wire.messages import TokenizeMsg
from tests.support.builders import DEMO_EOS, demo_tokenizer
from tests.support.engine_backend import EngineBackend
from tests.support.http_server import HttpServer, serve
from tests.support.played_model import TEMPLATES

CONTEXT = 320
OPTIONS: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "num_pages": 3000}
PROMPT = "Hello"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(TEMPLATES["hermes"])
    options = {**OPTIONS, "max_seq_len": CONTEXT, "chat_template": str(template), "page_size": 4}
    with (
        LLM("demo", **options) as llm,
        serve(make_backend=functools.partial(EngineBackend, llm=llm)) as running,
    ):
        yield running


@dataclass(frozen=True)
class Ending:
    """A way to end: what a client asks for, what LLM is asked for beside, what both are told.

    includes: the text holds this; without: and not this.
    """

    body: dict[str, Any]
    finish: str
    reason: str | int | None = None
    offline: dict[str, Any] = field(default_factory=dict)
    includes: str = ""
    without: str = "\0"


def biased(*token_ids: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A bias towards tokens, for HTTP and for LLM."""
    return (
        {"logit_bias": {str(i): 100 for i in token_ids}},
        {"logit_bias": tuple(TokenBias(i, 100.0) for i in token_ids)},
    )


EOS = DEMO_EOS
(LETTER,) = demo_tokenizer().encode("a")
END, END_OFFLINE = biased(EOS)
SAY, SAY_OFFLINE = biased(LETTER)
GO_ON: dict[str, Any] = {"ignore_eos": True}
ENDINGS = {
    "end of text": Ending(END, "stop", offline=END_OFFLINE),
    "end of text after min_tokens": Ending(
        {**END, "min_tokens": 5}, "stop", offline={**END_OFFLINE, "min_tokens": 5}
    ),
    "stop token": Ending(
        {**SAY, "stop_token_ids": [LETTER]},
        "stop",
        LETTER,
        {**SAY_OFFLINE, "stop_token_ids": (LETTER,)},
    ),
    "end of text as a stop token": Ending(
        {**END, **GO_ON, "stop_token_ids": [EOS]},
        "stop",
        EOS,
        {**END_OFFLINE, **GO_ON, "stop_token_ids": (EOS,)},
    ),
    "stop string": Ending(
        {**SAY, **GO_ON, "stop": ["zzzz", "aaa"]},
        "stop",
        "aaa",
        {**SAY_OFFLINE, **GO_ON, "stop": ("zzzz", "aaa")},
        without="a",
    ),
    "stop string, included": Ending(
        {**SAY, **GO_ON, "stop": "aaa", "include_stop_str_in_output": True},
        "stop",
        "aaa",
        {**SAY_OFFLINE, **GO_ON, "stop": ("aaa",), "include_stop_str_in_output": True},
        includes="aaa",
    ),
    "stop string in the last token": Ending(
        {**SAY, **GO_ON, "stop": "aaa", "max_tokens": 3},
        "stop",
        "aaa",
        {**SAY_OFFLINE, **GO_ON, "stop": ("aaa",), "max_tokens": 3},
    ),
    "length": Ending({**GO_ON, "max_tokens": 7}, "length", offline={**GO_ON, "max_tokens": 7}),
    "length in a stop string": Ending(
        {**SAY, **GO_ON, "stop": "aaa", "max_tokens": 2},
        "length",
        None,
        {**SAY_OFFLINE, **GO_ON, "stop": ("aaa",), "max_tokens": 2},
        includes="aa",
    ),
    "grammar": Ending(
        {"guided_regex": "[a-c]{6}"},
        "stop",
        offline={"grammar": Grammar.regex("[a-c]{6}")},
    ),
    "length in a grammar": Ending(
        {"guided_regex": "[a-c]{60}", "max_tokens": 5},
        "length",
        offline={"grammar": Grammar.regex("[a-c]{60}"), "max_tokens": 5},
    ),
    "stop string in a grammar": Ending(
        {"guided_regex": "[a-c]{20}de", "stop": "d", "max_tokens": 60},
        "stop",
        "d",
        {"grammar": Grammar.regex("[a-c]{20}de"), "stop": ("d",), "max_tokens": 60},
        without="d",
    ),
}
COMMON: dict[str, Any] = {"temperature": 1.0, "seed": 4, "n": 2}
Told = tuple[str, str, Any]


def chat_told(server: HttpServer, body: dict[str, Any]) -> tuple[list[Told], list[Told], Any, Any]:
    """Text, finish and reason of each choice, whole and streamed, and the usages."""
    create = functools.partial(
        server.openai.chat.completions.create,
        model="org/tiny",
        messages=[{"role": "user", "content": PROMPT}],
        extra_body={**COMMON, **body},
    )
    completion: Any = create()
    whole = [(c.message.content or "", c.finish_reason, c.stop_reason) for c in completion.choices]
    texts, ends, usage = ["", ""], dict[int, tuple[str, Any]](), None
    for chunk in create(stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                assert choice.index not in ends
                ends[choice.index] = (choice.finish_reason, choice.stop_reason)
    return whole, [(texts[i], *ends[i]) for i in sorted(ends)], completion.usage, usage


def text_told(server: HttpServer, body: dict[str, Any]) -> tuple[list[Told], list[Told], Any, Any]:
    """The same of the other route."""
    body = {"max_tokens": 100, **COMMON, **body}
    create = functools.partial(
        server.openai.completions.create, model="org/tiny", prompt=PROMPT, extra_body=body
    )
    completion: Any = create()
    whole = [(c.text, c.finish_reason, c.stop_reason) for c in completion.choices]
    texts, ends, usage = ["", ""], dict[int, tuple[str, Any]](), None
    for chunk in create(stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                ends[choice.index] = (choice.finish_reason, choice.stop_reason)
    return whole, [(texts[i], *ends[i]) for i in sorted(ends)], completion.usage, usage


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("chat", [True, False])
def test_an_ending_is_reported_alike_everywhere(server: HttpServer, name: str, chat: bool) -> None:
    ending = ENDINGS[name]
    whole, streamed, usage, last_usage = (chat_told if chat else text_told)(server, ending.body)
    assert whole == streamed
    for text, finish, reason in whole:
        assert (finish, reason) == (ending.finish, ending.reason)
        assert ending.includes in text
        assert ending.without not in text
    assert usage.model_dump(exclude={"prompt_tokens_details"}) == last_usage.model_dump(
        exclude={"prompt_tokens_details"}
    )
    llm = server.backend.llm  # type: ignore[attr-defined]
    assert server.in_loop(lambda: offline_told(llm, ending, chat)) == whole


def offline_told(llm: LLM, ending: Ending, chat: bool) -> list[Told]:
    params = SamplingParams(**{"max_tokens": 100, **COMMON, **ending.offline})
    if chat:
        messages = ({"role": "user", "content": PROMPT},)
        request = TokenizeMsg(uid=0, messages=messages, sampling=params)
    else:
        request = TokenizeMsg(uid=0, prompt=PROMPT, sampling=params)
    (output,) = llm.stream_outputs([llm.prepare(request)])
    return [(c.text, str(c.finish_reason), c.stop_reason) for c in output.outputs]


def test_the_end_of_the_context_is_a_length(server: HttpServer) -> None:
    whole, streamed, usage, last_usage = chat_told(server, {**GO_ON, "n": 1})
    assert whole == streamed
    assert whole[0][1:] == ("length", None)
    assert usage.total_tokens == last_usage.total_tokens == CONTEXT


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}


Calls = list[tuple[str, str]]


def call_told(server: HttpServer, **fields: Any) -> tuple[Calls, tuple[str, Any], int]:
    """Calls, finish and reason, and the tokens, of a call that must be made: whole and streamed."""
    create: Any = functools.partial(
        server.openai.chat.completions.create,
        model="org/tiny",
        messages=[{"role": "user", "content": "What is 3 + 4?"}],
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "add"}},
        parallel_tool_calls=False,
        temperature=0,
        **fields,
    )
    completion = create()
    (choice,) = completion.choices
    state, ends = ChatCompletionStreamState(), []
    for chunk in create(stream=True):
        state.handle_chunk(chunk)
        ends += [(c.finish_reason, c.stop_reason) for c in chunk.choices if c.finish_reason]
    (streamed,) = state.current_completion_snapshot.choices
    assert ends == [(choice.finish_reason, choice.stop_reason)]
    calls, streamed_calls = (
        [(call.function.name, call.function.arguments) for call in c.message.tool_calls or []]
        for c in (choice, streamed)
    )
    assert calls == streamed_calls
    assert (choice.message.content or "") == (streamed.message.content or "")
    return calls, ends[0], completion.usage.completion_tokens


def test_a_call_that_ends_and_one_that_a_stop_string_cuts_are_reported_alike(
    server: HttpServer,
) -> None:
    [(name, arguments)], end, _ = call_told(server)
    assert name == "add"
    assert 0 <= json.loads(arguments)["a"] <= 99
    assert end == ("tool_calls", None)
    calls, end, _ = call_told(server, stop='"a"')
    assert (calls, end) == ([("add", "{")], ("stop", '"a"'))


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.soak)])
def test_a_call_cut_anywhere_by_max_tokens_says_length_until_it_is_whole(
    server: HttpServer, every: int
) -> None:
    [(_, arguments)], _, num_tokens = call_told(server)
    for max_tokens in sorted({*range(1, num_tokens, every), num_tokens - 2, num_tokens - 1}):
        calls, end, _ = call_told(server, max_tokens=max_tokens)
        whole = calls == [("add", arguments)]
        assert end == ("tool_calls" if whole else "length", None)
        assert whole or not calls or arguments.startswith(calls[0][1])
