"""/render shows a request as the engine gets it; the oracle is the message of a generation."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.http_server import MODEL, HttpServer, serve
from tests.support.played_model import TEMPLATES, PlayedModel

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hello, 你好"}]},
    {
        "messages": [{"role": "user", "content": "What is 1 + 1?"}],
        "tools": TOOLS,
        "chat_template_kwargs": {"enable_thinking": False},
        "max_completion_tokens": 40,
        "temperature": 0.5,
        "stop": "END",
        "cache_salt": "tenant",
        "stream": True,
    },
    {"messages": [{"role": "user", "content": "Go"}], "seed": 4, "top_k": 3, "min_p": 0.1, "n": 2},
]
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": "Once upon a time"},
    {"prompt": ["one", "", "two"], "max_tokens": 3, "logit_bias": {"5": -2}},
    {"prompt": [5, 6, 7], "repetition_penalty": 1.5, "logprobs": 2},
    {"prompt": [[5, 6], [7]], "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [9]},
]
SAMPLING = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "min_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs"),
)


@pytest.fixture(scope="module")
def played() -> Iterator[HttpServer]:
    with serve(make_backend=functools.partial(PlayedModel, template=TEMPLATES["hermes"])) as made:
        yield made


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", body) for body in CHATS]
    + [("/v1/completions", body) for body in COMPLETIONS],
)
def test_what_is_rendered_is_what_a_generation_sends(
    path: str, body: dict[str, Any], played: HttpServer
) -> None:
    model: Any = played.backend
    model.messages.clear()
    response = played.http.post(f"{path}/render", json=body)
    assert response.status_code == 200, response.text
    rendered = response.json()
    assert not model.messages, "a request was generated"
    items = rendered if path == "/v1/completions" else [rendered]
    assert played.http.post(path, json=body).status_code == 200
    assert len(items) == len(model.messages)
    for item, sent in zip(items, model.messages, strict=True):
        assert item["token_ids"] == sent.prompt_ids.tolist()
        assert item["features"] is None
        assert item["model"] == MODEL.name
        assert item["stream"] == body.get("stream", False)
        assert item["cache_salt"] == (sent.cache_salt or None)
        params, sampling = item["sampling_params"], sent.sampling
        if body.get("seed") is None:
            assert params.pop("seed") is None  # the server draws one when it generates
        for name in SAMPLING:
            assert params.get(name) == (getattr(sampling, name) if name in params else None)
        room = played.registry.model.max_model_len - len(item["token_ids"])
        assert params["max_tokens"] == (sampling.max_tokens or room)
        assert (params["stop"], params["stop_token_ids"]) == (
            list(sampling.stop),
            list(sampling.stop_token_ids),
        )
        biases = {str(bias.token_id): bias.value for bias in sampling.logit_bias}
        assert params["logit_bias"] == (biases or None)
    ids = [item["request_id"] for item in items]
    prefix = "cmpl-" if path == "/v1/completions" else "chatcmpl-"
    assert all(id.startswith(prefix) for id in ids)
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, {"json": {"type": "object"}}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({}, None),
    ],
)
def test_a_grammar_is_shown_under_vllms_name(
    field: dict[str, Any], expected: dict[str, Any] | None, played: HttpServer
) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], **field}
    rendered = played.http.post("/v1/chat/completions/render", json=body).json()
    assert rendered["sampling_params"]["structured_outputs"] == expected


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions/render", {"messages": []}, "messages"),
        ("/v1/chat/completions/render", {"messages": CHATS[0]["messages"], "n": 0}, "n"),
        ("/v1/completions/render", {"prompt": [10**8]}, "prompt"),
        ("/v1/completions/render", {"prompt": "a", "max_tokens": 10**7}, "prompt"),
        ("/v1/completions/render", {}, "prompt"),
    ],
)
def test_what_a_generation_refuses_is_not_rendered(
    path: str, body: dict[str, Any], param: str, played: HttpServer
) -> None:
    response = played.http.post(path, json=body)
    generated = played.http.post(path.removesuffix("/render"), json=body)
    assert response.status_code == generated.status_code == 400
    assert response.json() == generated.json()
    assert response.json()["error"]["param"] == param


def test_the_id_of_a_rendered_request_is_the_clients(played: HttpServer) -> None:
    body = {"prompt": "Hi", "request_id": "mine"}
    (rendered,) = played.http.post("/v1/completions/render", json=body).json()
    assert rendered["request_id"] == "cmpl-mine"
