"""Fields that nobody knows, and values that only look as if they asked for nothing."""

import re
from typing import Any

import pytest

from tests.support.http_server import HttpServer, serve

HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("name", "value"),
    [("suffix", 0), ("top_logprobs", False), ("best_of", 2), ("functions", [{}])],
)
def test_a_value_that_only_resembles_a_neutral_one_is_refused(
    server: HttpServer, name: str, value: Any
) -> None:
    path = "/v1/chat/completions" if name == "functions" else "/v1/completions"
    response = server.http.post(path, json={"prompt": "hi", name: value})
    assert response.json()["error"]["code"] == "unsupported_parameter"


def test_best_of_may_be_n(server: HttpServer) -> None:
    body = {"prompt": "hi", "best_of": 2, "n": 2}
    assert server.http.post("/v1/completions", json=body).status_code == 200


def test_an_unknown_field_is_accepted_counted_logged_once_and_told(
    server: HttpServer, caplog: pytest.LogCaptureFixture
) -> None:
    name = "made_up\u20ac\n"
    options = {"include_usage": True, "extra": 1}
    for _ in range(2):
        response = server.chat(**{name: 1}, stream=True, stream_options=options)
        assert response.status_code == 200
        assert (
            response.headers["x-minisrv-warnings"]
            == r"unknown fields ignored: made_up\u20ac\n, stream_options.extra"
        )
    assert server.app.state.unknown_fields.counts[r"made_up\u20ac\n"] == 2
    assert len(re.findall(r"unknown request field made_up\\u20ac\\n", caplog.text)) == 1


def test_many_unknown_fields_fit_a_header(server: HttpServer) -> None:
    response = server.chat(**{f"{i:03}" + "x" * 500: 1 for i in range(300)})
    assert response.status_code == 200
    assert response.headers["x-minisrv-warnings"].endswith("and 284 more")
    assert len(response.headers["x-minisrv-warnings"]) < 2000


def test_strict_params_refuses_an_unknown_field() -> None:
    with serve(strict_params=True) as server:
        response = server.chat(made_up=1)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "made_up"
        assert server.chat(user="me").status_code == 200


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "tokenize"])
def test_template_variables_of_the_server_cannot_be_set(server: HttpServer, name: str) -> None:
    response = server.chat(chat_template_kwargs={name: 1})
    assert response.json()["error"]["param"] == f"chat_template_kwargs.{name}"
