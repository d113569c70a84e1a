"""Options of the server that change what requests mean: names of the model, template variables."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from minisrv.checkpoint.chat_format import ChatFormat
from minisrv.config import ServerConfig
from minisrv.errors import ConfigError
from minisrv.frontend.registry.model_info import ModelInfo
from tests.support.http_server import HttpServer, serve
from tests.support.scripted_backend import ScriptedBackend

HI = [{"role": "user", "content": "hi"}]
CHAT = ("/v1/chat/completions", {"messages": HI})
MESSAGES = ("/v1/messages", {"messages": HI, "max_tokens": 5})
RESPONSES = ("/v1/responses", {"input": "hi"})
CONFIG = ServerConfig(
    served_model_name=("first", "second"),
    chat_template_kwargs='{"enable_thinking": false, "tone": "dry"}',
)
FACTS: dict[str, Any] = {
    "max_seq_len": 2048,
    "vocab_size": 1000,
    "sampling_defaults": {},
    "chat_format": asdict(
        ChatFormat(reasoning_markers=("<think>", "</think>"), switches_reasoning=True)
    ),
}


class NamedBackend(ScriptedBackend):
    info = ModelInfo.from_facts(CONFIG, FACTS)


@pytest.fixture(scope="module")
def named() -> Iterator[HttpServer]:
    with serve(make_backend=NamedBackend) as running:
        yield running


def test_all_names_are_listed_and_the_first_is_the_models_own(named: HttpServer) -> None:
    assert [model.id for model in named.openai.models.list()] == ["first", "second"]
    assert named.openai.models.retrieve("second").id == "second"
    response = named.http.post(CHAT[0], json={**CHAT[1], "model": "third"})
    assert response.status_code == 404
    assert "'first', 'second'" in response.json()["error"]["message"]


@pytest.mark.parametrize(("path", "body"), [CHAT, MESSAGES, RESPONSES], ids=str)
def test_a_reply_has_the_name_that_was_asked_for(
    named: HttpServer, path: str, body: dict[str, Any]
) -> None:
    for sent, told in (({}, "first"), ({"model": "second"}, "second")):
        assert named.http.post(path, json={**body, **sent}).json()["model"] == told


@pytest.mark.parametrize(("path", "body"), [CHAT, MESSAGES, RESPONSES], ids=str)
def test_variables_of_the_server_stand_under_those_of_a_request(
    named: HttpServer, path: str, body: dict[str, Any]
) -> None:
    def variables(**fields: Any) -> dict[str, Any]:
        assert named.http.post(path, json={**body, **fields}).status_code == 200
        return named.backend.requests[-1].template_kwargs

    assert variables() == {"enable_thinking": False, "tone": "dry"}
    assert variables(chat_template_kwargs={"tone": "wry", "more": 1}) == {
        "enable_thinking": False,
        "tone": "wry",
        "more": 1,
    }


def test_a_thought_that_is_asked_for_goes_before_the_servers_variables(named: HttpServer) -> None:
    assert named.chat(enable_thinking=True).status_code == 200
    assert named.backend.requests[-1].template_kwargs["enable_thinking"] is True


def test_server_info_shows_the_options() -> None:
    with serve(chat_template_kwargs=CONFIG.chat_template_kwargs) as server:
        config = server.http.get("/server_info").json()["config"]
    assert config["chat_template_kwargs"] == CONFIG.chat_template_kwargs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "must be a JSON object"),
        ('{"tools": 1}', "may not set tools"),
    ],
)
def test_variables_that_cannot_be_used_stop_the_start(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--chat-template-kwargs .*{message}"):
        ServerConfig(chat_template_kwargs=text)


def test_a_name_may_come_alone_or_from_the_environment() -> None:
    assert ServerConfig(model="m").served_names == ("m",)
    assert ServerConfig(served_model_name="a").served_names == ("a",)
    environ = {"MINISRV_SERVED_MODEL_NAME": "a, b"}
    assert ServerConfig.from_environment(environ).served_names == ("a", "b")
