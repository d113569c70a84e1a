"""What fields of a request do to the text, with the demo model behind the application."""

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from minisrv.llm import LLM
from tests.support.engine_backend import EngineBackend
from tests.support.http_server import HttpServer, serve
from tests.support.played_model import TEMPLATES

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ROUTES = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
PROMPT = "Once upon a time there was a"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    """Its template knows tools and thoughts, so that their fields can be supported."""
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATES["hermes"])
    with LLM("demo", num_threads=1, chat_template=str(template), num_pages=400) as llm:
        make = functools.partial(EngineBackend, llm=llm)
        with serve(make_backend=make) as server:
            yield server


def post(server: HttpServer, path: str, **fields: Any) -> dict[str, Any]:
    response = server.http.post(path, json={"prompt": PROMPT, "max_tokens": 16, **fields})
    assert response.status_code == 200, response.text
    value: dict[str, Any] = response.json()
    return value


def choices(server: HttpServer, path: str, **fields: Any) -> list[tuple[str, list[int], str]]:
    """Text, token ids and finish reason of each choice."""
    reply = post(server, path, return_token_ids=True, **fields)
    return [
        (
            choice["message"]["content"] if path == CHAT else choice["text"],
            choice["token_ids"],
            choice["finish_reason"],
        )
        for choice in reply["choices"]
    ]


def text(server: HttpServer, path: str, **fields: Any) -> str:
    ((content, _, _),) = choices(server, path, **fields)
    return content


@ROUTES
def test_a_model_must_be_the_served_one(engine: HttpServer, path: str) -> None:
    for name in ("", "org/tiny"):
        assert post(engine, path, model=name)["model"] == "org/tiny"
    assert engine.http.post(path, json={"prompt": PROMPT, "model": "x"}).status_code == 404


@ROUTES
def test_max_tokens_bounds_the_output(engine: HttpServer, path: str) -> None:
    for count in (1, 7):
        ((_, ids, reason),) = choices(engine, path, max_tokens=count)
        assert (len(ids), reason) == (count, "length")
    if path == CHAT:
        ((_, ids, _),) = choices(engine, path, max_tokens=None, max_completion_tokens=5)
        assert len(ids) == 5


@ROUTES
def test_the_draw_follows_temperature_top_p_top_k_min_p_and_seed(
    engine: HttpServer, path: str
) -> None:
    greedy = text(engine, path, temperature=0)
    hot = {"temperature": 2.0, "seed": 1}
    drawn = text(engine, path, **hot)
    assert drawn != greedy
    assert text(engine, path, **hot) == drawn
    assert text(engine, path, **hot | {"seed": 2}) != drawn
    for narrow in ({"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}):
        assert text(engine, path, **hot, **narrow) == greedy, narrow
    for wide in ({"top_p": 1.0}, {"top_k": -1}, {"min_p": 0.0}):
        assert text(engine, path, **hot, **wide) == drawn, wide
    assert text(engine, path, temperature=2.0, sampling_seed=1) == drawn


@ROUTES
def test_penalties_change_a_text(engine: HttpServer, path: str) -> None:
    drawn = {"temperature": 1.0, "seed": 3, "max_tokens": 48}
    plain = text(engine, path, **drawn)
    names = ("presence_penalty", "frequency_penalty", "repetition_penalty", "repeat_penalty")
    texts = {name: text(engine, path, **drawn, **{name: 2.0}) for name in names}
    assert plain not in texts.values()
    assert texts["repeat_penalty"] == texts["repetition_penalty"]
    assert len(set(texts.values())) == 3


@ROUTES
def test_logit_bias_ignore_eos_and_skip_special_tokens_make_a_text_of_end_tokens(
    engine: HttpServer, path: str
) -> None:
    llm = engine.backend.llm  # type: ignore[attr-defined]
    eos = llm.model_config.eos_token_ids[0]
    bias = {"logit_bias": {str(eos): 100}, "max_tokens": 3}
    assert choices(engine, path, **bias) == [("", [eos], "stop")]
    assert choices(engine, path, **bias, ignore_eos=True) == [("", [eos] * 3, "length")]
    shown = choices(engine, path, **bias, ignore_eos=True, skip_special_tokens=False)
    assert shown == [(llm.tokenizer.token(eos) * 3, [eos] * 3, "length")]


@ROUTES
def test_stop_stop_token_ids_and_min_tokens_end_the_text(engine: HttpServer, path: str) -> None:
    ((full, ids, _),) = choices(engine, path)
    stop = full[4:7]
    cut = full[: full.index(stop)]
    assert choices(engine, path, stop=stop)[0][::2] == (cut, "stop")
    assert choices(engine, path, stop=["\0", stop])[0][::2] == (cut, "stop")
    assert text(engine, path, stop=stop, include_stop_str_in_output=True) == cut + stop
    assert text(engine, path, stop=stop, no_stop_trim=True) == cut + stop
    first = ids.index(ids[3])
    ((_, stopped, reason),) = choices(engine, path, stop_token_ids=[ids[3]])
    assert (stopped, reason) == (ids[: first + 1], "stop")
    ((_, later, _),) = choices(engine, path, stop_token_ids=[ids[3]], min_tokens=first + 1)
    assert len(later) > len(stopped)


@ROUTES
def test_n_choices_are_drawn_apart(engine: HttpServer, path: str) -> None:
    drawn = choices(engine, path, n=3, temperature=2.0, seed=1)
    assert len({content for content, _, _ in drawn}) == 3
    reply = post(engine, path, n=3)
    assert reply["usage"]["completion_tokens"] == 48
    if path == COMPLETIONS:
        assert len(post(engine, path, n=3, best_of=3)["choices"]) == 3


@ROUTES
def test_a_stream_joins_to_the_whole_text_with_the_usage_that_stream_options_ask_for(
    engine: HttpServer, path: str
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": PROMPT, "max_tokens": 16, "stream": True, "stream_options": options}
    events = engine.http.post(path, json=body).text.split("\n\n")[:-2]
    *chunks, last = [json.loads(event.removeprefix("data: ")) for event in events]
    pieces = [chunk["choices"][0] for chunk in chunks]
    joined = "".join(
        piece["delta"].get("content", "") if path == CHAT else piece["text"] for piece in pieces
    )
    assert joined == text(engine, path)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 16
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)


@ROUTES
def test_logprobs_and_top_logprobs_tell_of_the_tokens_and_echo_of_the_prompt(
    engine: HttpServer, path: str
) -> None:
    if path == CHAT:
        reply = post(engine, path, temperature=0, logprobs=True, top_logprobs=2)
        told = reply["choices"][0]["logprobs"]["content"]
        assert [len(token["top_logprobs"]) for token in told] == [2] * 16
        assert all(token["top_logprobs"][0]["token"] == token["token"] for token in told)
        plain = post(engine, path, logprobs=True)["choices"][0]["logprobs"]["content"]
        assert all(token["top_logprobs"] == [] for token in plain)
    else:
        (choice,) = post(engine, path, temperature=0, logprobs=2, echo=True)["choices"]
        assert choice["text"] == PROMPT + text(engine, path)
        scores = choice["logprobs"]["token_logprobs"]
        assert scores[0] is None
        assert len(scores) == post(engine, path)["usage"]["total_tokens"]
    assert post(engine, path)["choices"][0]["logprobs"] is None


SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
SCHEMA["additionalProperties"] = False
AS_OBJECT = r'\{\s*"a":\s*[12]\s*\}'


@ROUTES
@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA},
                }
            },
            AS_OBJECT,
        ),
        ({"structured_outputs": {"choice": ["red", "blue"]}}, "red|blue"),
        ({"guided_json": SCHEMA}, AS_OBJECT),
        ({"json_schema": SCHEMA}, AS_OBJECT),
        ({"guided_regex": "[ab]{3}c"}, "[ab]{3}c"),
        ({"regex": "[ab]{3}c"}, "[ab]{3}c"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"guided_grammar": 'start: "x" /[yz]/'}, "x[yz]"),
        ({"grammar": 'root ::= "x" [yz]'}, "x[yz]"),
        ({"ebnf": 'root ::= "x" [yz]'}, "x[yz]"),
    ],
)
def test_the_text_is_held_to_its_structure(
    engine: HttpServer, path: str, fields: dict[str, Any], pattern: str
) -> None:
    assert re.fullmatch(pattern, text(engine, path, max_tokens=64, **fields).strip())


@ROUTES
def test_a_request_is_named_and_timed_if_it_says_so(engine: HttpServer, path: str) -> None:
    for name in ("request_id", "rid"):
        assert post(engine, path, **{name: "mine-7"})["id"].endswith("-mine-7")
    assert post(engine, path, timings=True)["timings"]["prompt_tokens"] > 0
    assert "timings" not in post(engine, path, timings=False)


@ROUTES
def test_a_cached_prompt_is_found_only_under_its_own_salt(engine: HttpServer, path: str) -> None:
    prompt = f"A long tale for {path} that fills some pages of the cache, " * 3

    def cached(**fields: Any) -> int:
        usage = post(engine, path, prompt=prompt, **fields)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [cached(), cached(cache_salt="a"), cached(cache_salt="b")] == [0, 0, 0]
    hits = [cached(), cached(cache_salt="a"), cached(cache_salt="b")]
    assert hits[0] > 16
    assert hits == hits[:1] * 3
    assert cached(cache_salt="c") == 0
    native = {"text": prompt, "sampling_params": {"max_new_tokens": 1}}
    for fields, expected in (({"cache_salt": "a"}, hits[0]), ({"cache_salt": path}, 0)):
        reply = engine.http.post("/generate", json={**native, **fields}).json()
        assert reply["meta_info"]["cached_tokens"] == expected


@ROUTES
def test_return_progress_reports_how_far_the_prompt_is(engine: HttpServer, path: str) -> None:
    ids = [i % 500 for i in range(len(path), 1300 + len(path))]  # three steps of 512
    body = {"prompt": ids, "max_tokens": 3, "stream": True, "n": 2, "cache_salt": path}

    def stream(**fields: Any) -> list[dict[str, Any]]:
        events = engine.http.post(path, json={**body, **fields}).text.split("\n\n")[:-2]
        return [json.loads(event.removeprefix("data: ")) for event in events]

    chunks = stream(return_progress=True, stream_options={"include_usage": True})
    told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert [(each["processed"], each["total"], each["cache"]) for each in told] == [
        (512, 1300, 0),
        (1024, 1300, 0),
        (1300, 1300, 0),
    ]
    times = [each["time_ms"] for each in told]
    assert times == sorted(times)
    again = stream(return_progress=True)
    (only,) = [chunk["prompt_progress"] for chunk in again if "prompt_progress" in chunk]
    assert only["cache"] == 1296
    assert (only["processed"], only["total"]) == (1300, 1300)
    assert all("prompt_progress" not in chunk for chunk in stream())
    whole = {"prompt": ids, "max_tokens": 1, "return_progress": True}
    error = engine.http.post(path, json=whole).json()["error"]
    assert error["param"] == "return_progress"


def test_each_form_of_prompt_gives_the_same_text(engine: HttpServer) -> None:
    ids = engine.backend.llm.tokenizer.encode(PROMPT)  # type: ignore[attr-defined]
    expected = text(engine, COMPLETIONS)
    for form in ([PROMPT], ids, [ids]):
        assert text(engine, COMPLETIONS, prompt=form) == expected
    assert text(engine, CHAT, prompt=PROMPT) == text(engine, CHAT, prompt=ids) == expected
    both = choices(engine, COMPLETIONS, prompt=[PROMPT, "It was"])
    assert [content for content, _, _ in both] == [
        expected,
        text(engine, COMPLETIONS, prompt="It was"),
    ]


def error_of(server: HttpServer, path: str, **body: Any) -> dict[str, Any]:
    response = server.http.post(path, json=body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_prompt_of_several_is_named(engine: HttpServer, n: int, stream: bool) -> None:
    fields = {"n": n, "stream": stream, "max_tokens": 1}
    error = error_of(engine, COMPLETIONS, prompt=["a", ""], **fields)
    assert error["param"] == "prompt.1"
    assert error["message"].startswith("prompt.1 gives no token")
    error = error_of(engine, COMPLETIONS, prompt=[[5], [6], [5] * 5000], **fields)
    assert (error["param"], error["code"]) == ("prompt.2", "context_length_exceeded")
    assert error_of(engine, COMPLETIONS, prompt="", **fields)["param"] == "prompt"


def test_a_prompt_that_does_not_fit_is_reported_in_figures(engine: HttpServer) -> None:
    error = error_of(engine, COMPLETIONS, prompt=[5] * 5000)
    context = engine.registry.model.max_model_len
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (5000, context)
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, "max_tokens": context}
    error = error_of(engine, CHAT, **body)
    assert 0 < error["n_prompt_tokens"] < 100
    refused = engine.http.post("/v1/messages", json={**body, "min_tokens": context})
    message = refused.json()["error"]["message"]
    assert f"exceed context limit: {error['n_prompt_tokens']} + {context} > {context}" in message


@pytest.mark.parametrize("stream", [False, True])
def test_native_generation_names_the_prompt_that_was_sent(engine: HttpServer, stream: bool) -> None:
    error = error_of(engine, "/generate", text="", stream=stream)
    assert error["param"] == "text"
    assert error["message"].startswith("text gives no token")
    error = error_of(engine, "/generate", input_ids=[5] * 5000, stream=stream)
    assert (error["param"], error["n_prompt_tokens"]) == ("input_ids", 5000)
