"""What fields of a request do, seen in what goes to the engine and in what comes back."""

from typing import Any

import pytest
from http_server import HttpServer

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ROUTES = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])


def post(server: HttpServer, path: str, **fields: Any) -> Any:
    """The reply to a prompt, or the error."""
    response = server.http.post(path, json={"prompt": "hi", **fields})
    value = response.json()
    return value if response.status_code == 200 else value["error"]


def sampling_of(server: HttpServer, path: str, **fields: Any) -> Any:
    """What the engine is asked for."""
    assert "choices" in post(server, path, **fields)
    return server.backend.requests[-1].sampling


@ROUTES
@pytest.mark.parametrize(
    ("alias", "name", "value", "other"),
    [
        ("no_stop_trim", "include_stop_str_in_output", True, False),
        ("repeat_penalty", "repetition_penalty", 1.25, 1.5),
        ("sampling_seed", "seed", 17, 18),
    ],
)
def test_an_alias_does_what_its_field_does_and_must_agree_with_it(
    server: HttpServer, path: str, alias: str, name: str, value: Any, other: Any
) -> None:
    assert getattr(sampling_of(server, path, **{alias: value}), name) == value
    assert getattr(sampling_of(server, path, **{alias: value, name: value}), name) == value
    assert getattr(sampling_of(server, path, **{alias: None, name: other}), name) == other
    error = post(server, path, **{alias: value, name: other})
    assert error["param"] == alias
    assert name in error["message"]


@ROUTES
def test_an_error_names_the_field_as_the_request_does(server: HttpServer, path: str) -> None:
    assert post(server, path, repeat_penalty=3)["param"] == "repeat_penalty"
    assert post(server, path, repetition_penalty=3)["param"] == "repetition_penalty"
