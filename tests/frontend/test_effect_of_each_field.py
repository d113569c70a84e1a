"""What fields of a request do, seen in what goes to the engine and in what comes back."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.http_server import HttpServer, serve
from tests.support.played_model import EOS, TEMPLATES, PlayedModel

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ROUTES = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
SAYS = f"Well \u4f60\u597d \U0001f600.{CALL}"
ADD = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def played() -> Iterator[HttpServer]:
    with serve(make_backend=functools.partial(PlayedModel, template=TEMPLATES["hermes"])) as server:
        server.backend.text = SAYS  # type: ignore[attr-defined]
        yield server


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
@pytest.mark.parametrize("names", [("rid", "request_id"), ("return_tokens", "return_token_ids")])
def test_the_other_aliases_must_agree_too(
    server: HttpServer, path: str, names: tuple[str, str]
) -> None:
    values = ("a", "b") if "rid" in names else (True, False)
    assert post(server, path, **dict(zip(names, values, strict=True)))["param"] == names[0]
    assert "choices" in post(server, path, **dict.fromkeys(names, values[0]))


@ROUTES
def test_an_error_names_the_field_as_the_request_does(server: HttpServer, path: str) -> None:
    assert post(server, path, repeat_penalty=3)["param"] == "repeat_penalty"
    assert post(server, path, repetition_penalty=3)["param"] == "repetition_penalty"


def ids_of(server: HttpServer, text: str, special: bool = False) -> list[int]:
    return server.backend.tokenizer.encode(text, special)  # type: ignore[attr-defined,no-any-return]


def stream(server: HttpServer, path: str, **fields: Any) -> list[dict[str, Any]]:
    response = server.http.post(path, json={"stream": True, **fields})
    assert response.status_code == 200, response.text
    events = response.content.decode().split("\n\n")[:-2]
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("name", ["return_token_ids", "return_tokens"])
def test_return_token_ids_gives_a_chat_its_prompt_once_and_each_choice_its_output(
    played: HttpServer, name: str
) -> None:
    body = {"messages": HI, "tools": ADD, "n": 2, name: True}
    reply = played.http.post(CHAT, json=body).json()
    output = [*ids_of(played, SAYS), EOS]
    prompt = ids_of(played, played.backend.prompts[-1])  # type: ignore[attr-defined]
    assert reply["prompt_token_ids"] == prompt
    assert [choice["token_ids"] for choice in reply["choices"]] == [output, output]
    assert "prompt" not in reply

    chunks = stream(played, CHAT, **body)
    assert chunks[0]["prompt_token_ids"] == prompt
    assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])
    joined: dict[int, list[int]] = {0: [], 1: []}
    for chunk in chunks:
        joined[chunk["choices"][0]["index"]] += chunk["choices"][0]["token_ids"]
    assert joined == {0: output, 1: output}


@pytest.mark.parametrize("name", ["return_token_ids", "return_tokens"])
def test_a_completion_has_the_ids_of_prompt_and_output(played: HttpServer, name: str) -> None:
    body = {"prompt": "hi", "max_tokens": 99, name: True}
    (choice,) = played.http.post(COMPLETIONS, json=body).json()["choices"]
    assert choice["prompt_token_ids"] == ids_of(played, "hi", special=True)
    assert choice["token_ids"] == [*ids_of(played, SAYS), EOS]
    first, *rest = stream(played, COMPLETIONS, **body)
    assert first["choices"][0]["prompt_token_ids"] == choice["prompt_token_ids"]
    assert all("prompt_token_ids" not in chunk["choices"][0] for chunk in rest)


def test_a_chunk_has_the_ids_of_its_text(played: HttpServer) -> None:
    tokenizer = played.backend.tokenizer  # type: ignore[attr-defined]
    ids, text = list[int](), ""
    for chunk in stream(played, COMPLETIONS, prompt="hi", max_tokens=99, return_token_ids=True):
        ids += chunk["choices"][0]["token_ids"]
        text += chunk["choices"][0]["text"]
        assert tokenizer.decode(ids, True) == text
    assert text == SAYS


def test_the_ids_of_a_stop_string_are_returned_too(played: HttpServer) -> None:
    body = {"prompt": "hi", "stop": "ell", "return_token_ids": True}
    (choice,) = played.http.post(COMPLETIONS, json=body).json()["choices"]
    assert choice["text"] == "W"
    assert played.backend.tokenizer.decode(choice["token_ids"], True).startswith("Well")  # type: ignore[attr-defined]


def test_return_prompt_gives_each_prompt_as_the_model_saw_it(played: HttpServer) -> None:
    reply = played.http.post(CHAT, json={"messages": HI, "return_prompt": True}).json()
    assert reply["prompt"] == played.backend.prompts[-1] == "<|user|>hi<|assistant|>"  # type: ignore[attr-defined]
    assert "prompt_token_ids" not in reply
    assert "token_ids" not in reply["choices"][0]
    prompts = [[ids_of(played, "one")[0]], [EOS]]
    body = {"prompt": prompts, "n": 2, "return_prompt": True, "return_token_ids": True}
    choices = played.http.post(COMPLETIONS, json=body).json()["choices"]
    texts = [played.backend.tokenizer.decode(ids, False) for ids in prompts]  # type: ignore[attr-defined]
    assert [choice.get("prompt") for choice in choices] == [texts[0], None, texts[1], None]
    assert [choice.get("prompt_token_ids") for choice in choices] == [prompts[0], None, [2], None]
    seen = {}
    for chunk in stream(played, COMPLETIONS, **body):
        (choice,) = chunk["choices"]
        if "prompt" in choice:
            assert choice["index"] not in seen
            seen[choice["index"]] = choice["prompt"]
    assert seen == {0: texts[0], 2: texts[1]}


@ROUTES
@pytest.mark.parametrize("streamed", [False, True])
def test_nobody_else_gets_ids_or_prompts(played: HttpServer, path: str, streamed: bool) -> None:
    body = {"prompt": "hi", "stream": streamed}
    body |= {"return_token_ids": False, "return_tokens": False, "return_prompt": False}
    text = played.http.post(path, json=body).text
    assert '"token_ids"' not in text
    assert '"prompt_token_ids"' not in text
    assert '"prompt"' not in text


def prompt_of(server: HttpServer, **fields: Any) -> str:
    """What the model sees of a chat."""
    assert "choices" in server.http.post(CHAT, json=fields).json()
    return server.backend.prompts[-1]  # type: ignore[attr-defined,no-any-return]


def test_the_assistants_turn_is_begun_or_not_or_its_text_continued(played: HttpServer) -> None:
    chat = [*HI, {"role": "assistant", "content": "Once "}]
    begun = "<|user|>hi<|assistant|>Once <|assistant|>"
    assert prompt_of(played, messages=chat) == begun
    assert prompt_of(played, messages=chat, add_generation_prompt=True) == begun
    left_out = {"messages": chat, "add_generation_prompt": False}
    assert prompt_of(played, **left_out) == "<|user|>hi<|assistant|>Once "
    longer = [*HI, {"role": "assistant", "content": "Once", "tool_calls": [], "reasoning": "Hm."}]
    assert prompt_of(played, messages=longer, continue_final_message=True) == (
        "<|user|>hi<|assistant|><think>Hm.</think>Once"
    )
    both = {"messages": chat, "add_generation_prompt": True, "continue_final_message": True}
    for path in (CHAT, "/apply_template"):
        error = played.http.post(path, json=both).json()["error"]
        assert error["param"] == "continue_final_message"


@pytest.mark.parametrize(
    ("name", "value"), [("continue_final_message", True), ("add_generation_prompt", False)]
)
def test_a_prompt_has_no_turn_to_end(server: HttpServer, name: str, value: bool) -> None:
    assert post(server, CHAT, **{name: value})["param"] == name
    assert "choices" in post(server, CHAT, **{name: not value})


@pytest.mark.parametrize(
    ("begun", "said", "thought", "content"),
    [
        ("<think>So", " far.</think>Good.", " far.", "Good."),
        ("<think>So.</think>", "Good.", "", "Good."),
        ("Go", "od <think>x</think>", "", "od <think>x</think>"),
    ],
)
def test_a_continued_text_is_split_where_its_thought_ends(
    played: HttpServer, begun: str, said: str, thought: str, content: str
) -> None:
    played.backend.text = said  # type: ignore[attr-defined]
    chat = [*HI, {"role": "assistant", "content": begun}]
    body = {"messages": chat, "continue_final_message": True}
    message = played.http.post(CHAT, json=body).json()["choices"][0]["message"]
    played.backend.text = SAYS  # type: ignore[attr-defined]
    assert message.get("reasoning_content", "") == thought
    assert message["content"] == content


@ROUTES
def test_a_cache_salt_goes_with_the_request_to_the_cache(played: HttpServer, path: str) -> None:
    for fields, salt in (({}, ""), ({"cache_salt": "caf\u00e9" * 32}, "caf\u00e9" * 32)):
        assert "choices" in post(played, path, **fields)
        assert played.backend.messages[-1].cache_salt == salt  # type: ignore[attr-defined]
    for wrong in ("", "x" * 129, 5):
        assert post(played, path, cache_salt=wrong)["param"] == "cache_salt"


def test_a_request_brings_a_template_only_to_a_server_that_trusts_it(played: HttpServer) -> None:
    body = {"messages": HI, "chat_template": "{{ messages[0].content }}!"}
    for path in (CHAT, "/apply_template", "/tokenize"):
        error = played.http.post(path, json=body).json()["error"]
        assert (error["param"], error["code"]) == ("chat_template", "unsupported_parameter")
        assert "--trust-request-chat-template" in error["message"]
    make = functools.partial(PlayedModel, template=TEMPLATES["hermes"])
    with serve(make_backend=make, trust_request_chat_template=True) as server:
        assert prompt_of(server, **body) == "hi!"
        assert prompt_of(server, messages=HI) == "<|user|>hi<|assistant|>"
        wrong = {"messages": HI, "chat_template": "{% if %}"}
        response = server.http.post(CHAT, json=wrong)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template")
        assert post(server, CHAT, chat_template="x")["param"] == "chat_template"
        schema = server.app.openapi()["paths"][CHAT]["post"]["requestBody"]
        assert "chat_template" in json.dumps(schema)
