"""Extreme numbers of the sampling fields, in every dialect: accepted as offline, or a named 400."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from minisrv.errors import InvalidRequestError
from minisrv.sampling_params import SamplingParams, read_logit_bias
from tests.support.http_server import HttpServer

HI = [{"role": "user", "content": "hi"}]
DIALECTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": HI},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": HI, "max_tokens": 5},
    "/generate": {"text": "hi"},
}
NAMES = [
    *("temperature", "top_p", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
]
NUMBERS = [
    *(5e-324, 1e-300, 1e-46, 7e-46, 1e-45, 1.4e-45, 1e-40, 1e-38, 1e-7, 1e-6, 0.5),
    *(math.nextafter(1, 0), math.nextafter(1, 2), 1 - 1e-9, 1 + 1e-9, math.nextafter(2, 3), 2),
    *(3.4e38, 1e39, 1.7e308, -0.0, -5e-324, -1e-46, -1e39, 10**400, -(10**400)),
]


def refusal(**fields: Any) -> str | None:
    try:
        SamplingParams(**fields)
    except InvalidRequestError as error:
        return error.param if len(error.message) < 200 else "too long"
    return None


def body_of(path: str, name: str, value: Any) -> dict[str, Any]:
    body = dict(DIALECTS[path])
    return body | ({"sampling_params": {name: value}} if path == "/generate" else {name: value})


@pytest.mark.parametrize("path", DIALECTS)
def test_a_number_is_refused_by_name_or_accepted_as_offline(server: HttpServer, path: str) -> None:
    for name in NAMES[:3] if path == "/generate" else NAMES:
        for number in NUMBERS:
            content = json.dumps(body_of(path, name, number))
            response = server.http.post(path, content=content, headers=JSON)
            refused = refusal(**{name: number}) is not None
            shown = f"{name} {number if abs(number) < 1e300 else 'huge'}: {response.text}"
            assert response.status_code == (400 if refused else 200), shown
            if refused and abs(number) < 1e308:
                assert name in response.json()["error"]["message"], shown


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("name", ["top_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [5e-324, 1e-300, 1e-46, 7e-46])
def test_a_number_that_becomes_zero_is_refused_where_zero_is(name: str, value: float) -> None:
    assert refusal(**{name: value}) == name


@pytest.mark.parametrize("value", [10**400, -(10**5000), math.inf, math.nan], ids=range(4))
def test_a_number_beyond_the_doubles_is_refused_in_a_short_sentence(value: float) -> None:
    for name in (*NAMES, "top_k", "seed", "n", "max_tokens", "min_tokens", "logprobs"):
        assert refusal(**{name: value}) == name
    with pytest.raises(InvalidRequestError, match="must be a number") as caught:
        SamplingParams(logit_bias=read_logit_bias({"5": value}))
    assert len(caught.value.message) < 200
