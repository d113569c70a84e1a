"""Structured output from the real server, through the openai client."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, Field

from tests.support.server_process import ServerProcess, running

ASK: list[Any] = [{"role": "user", "content": "Answer in JSON: a person."}]


class Address(BaseModel):
    street: str = Field(max_length=12)
    number: int = Field(ge=1, le=99)


class Person(BaseModel):
    """Somebody."""

    name: str = Field(max_length=10)
    role: Literal["cook", "pilot"]
    age: int | None = Field(default=None, ge=0, le=120)
    homes: list[Address] = Field(max_length=2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    tmp_dir = tmp_path_factory.mktemp("s") / "t"
    arguments = ("--model", "demo", "--num-threads", "1", "--kv-memory", "64MiB")
    arguments += ("--grammar-cpu-s", "1")
    with running(*arguments, tmp_dir=tmp_dir, hash_engine=False) as server:
        yield server
        server.popen.terminate()
        assert server.wait() == 0


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_parse_gives_an_object_of_the_pydantic_model(client: openai.OpenAI) -> None:
    for parse in (client.chat.completions.parse, client.beta.chat.completions.parse):
        completion = parse(
            model="demo",
            messages=ASK,
            response_format=Person,
            temperature=1.0,
            seed=3,
            n=3,
            max_tokens=400,
        )
        assert len(completion.choices) == 3
        for choice in completion.choices:
            assert choice.finish_reason == "stop"
            assert isinstance(choice.message.parsed, Person)
            assert choice.message.content is not None
            assert Person.model_validate_json(choice.message.content) == choice.message.parsed


def test_a_stream_gives_the_same_text_and_parses_too(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "demo", "messages": ASK, "seed": 5, "max_tokens": 400}
    whole = client.chat.completions.parse(**request, response_format=Person)
    with client.chat.completions.stream(**request, response_format=Person) as stream:
        for event in stream:
            if event.type == "chunk":
                ChatCompletionChunk.model_validate(event.chunk.model_dump(), strict=True)
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == whole.choices[0].message.parsed
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_json_object_and_json_schema_as_plain_fields(client: openai.OpenAI) -> None:
    formats: list[Any] = [
        {"type": "json_object", "schema": {"type": "object", "maxProperties": 0}},
        {
            "type": "json_schema",
            "json_schema": {
                "name": "answer",
                "strict": True,
                "schema": {
                    "type": "object",
                    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 500}},
                    "required": ["sum"],
                    "additionalProperties": False,
                },
            },
        },
    ]
    for response_format in formats:
        completion = client.chat.completions.create(
            model="demo", messages=ASK, response_format=response_format, max_tokens=300
        )
        ChatCompletion.model_validate(completion.model_dump(), strict=True)
        assert completion.choices[0].finish_reason == "stop"
        inner = response_format.get("json_schema", response_format)
        jsonschema.validate(
            json.loads(completion.choices[0].message.content or ""), inner["schema"]
        )


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[a-f]{3}-[0-9]{2}"}, "[a-f]{3}-[0-9]{2}"),
        ({"regex": "[a-f]{3}"}, "[a-f]{3}"),
        ({"guided_choice": ["red", "green", "light blue"]}, "red|green|light blue"),
        ({"guided_json": {"enum": [[1, "a"]]}}, r'\[\s*1\s*,\s*"a"\s*\]'),
        ({"guided_json": '{"const": "x"}'}, '"x"'),
        ({"json_schema": {"const": 5}}, "5"),
        ({"guided_grammar": 'start: "<" N ">"\nN: /[0-9]{2}/'}, "<[0-9]{2}>"),
        ({"grammar": 'root ::= "a" [0-9] "z"'}, "a[0-9]z"),
        ({"ebnf": 'root ::= "b" | "c"'}, "b|c"),
        ({"structured_outputs": {"regex": "x{4}"}}, "x{4}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"json": {"const": 1}}}, "1"),
        ({"structured_outputs": {"grammar": 'start: "q"'}}, "q"),
    ],
    ids=str,
)
def test_each_field_holds_the_text_of_chats_and_completions(
    client: openai.OpenAI, fields: dict[str, Any], pattern: str
) -> None:
    sampling: dict[str, Any] = {"max_tokens": 200, "temperature": 1.0, "seed": 5}
    chat = client.chat.completions.create(model="demo", messages=ASK, extra_body=fields, **sampling)
    completion = client.completions.create(
        model="demo", prompt="Once", extra_body=fields, **sampling
    )
    for text in (chat.choices[0].message.content or "", completion.choices[0].text):
        assert re.fullmatch(pattern, text), text
    assert chat.choices[0].finish_reason == completion.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_schema_is_a_400_that_says_where_before_anything_else(
    server: ServerProcess, stream: bool
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "list"}}}}
    body = {
        "messages": ASK,
        "stream": stream,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": schema},
        },
    }
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "response_format.json_schema.schema"
    assert "at /properties/a/items: Invalid type: list" in error["message"]


def test_max_tokens_cuts_and_says_length(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model="demo", messages=ASK, max_tokens=7, extra_body={"guided_regex": "[a-z]{50}"}
    )
    assert completion.choices[0].finish_reason == "length"
    assert re.fullmatch("[a-z]{7,50}", completion.choices[0].message.content or "")


def test_stop_strings_and_seeds_work_beside_a_grammar(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "demo", "messages": ASK, "max_tokens": 60, "temperature": 1.0, "seed": 11,
        "extra_body": {"guided_regex": "([a-z]{2} )+end"},
    }  # fmt: skip
    first, second = (client.chat.completions.create(**request) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    stopped = client.chat.completions.create(**request, stop=[" "])
    assert stopped.choices[0].finish_reason == "stop"
    assert re.fullmatch("[a-z]{2}", stopped.choices[0].message.content or "")


@pytest.mark.timed
def test_a_hostile_schema_is_a_400_and_stops_nobody(server: ServerProcess) -> None:
    multiples = [{"multipleOf": 9973}, {"multipleOf": 9967}]
    schema = {"type": "integer", "allOf": multiples}
    hostile = {"model": "demo", "prompt": "x", "structured_outputs": {"json": schema}}
    honest = {"model": "demo", "prompt": "x", "max_tokens": 8, "guided_regex": "[0-9]{4}"}
    with httpx.Client(base_url=server.url, timeout=30) as http:
        assert http.post("/v1/completions", json=honest).status_code == 200
        with ThreadPoolExecutor() as pool:
            refused = pool.submit(http.post, "/v1/completions", json=hostile)
            longest = 0.0
            while not refused.done():
                began = time.perf_counter()
                assert http.post("/tokenize", json={"prompt": "hello"}).status_code == 200
                longest = max(longest, time.perf_counter() - began)
        reply = refused.result()
        assert reply.status_code == 400
        assert "takes more than 1 s or 512 MiB to compile" in reply.json()["error"]["message"]
        assert reply.json()["error"]["param"] == "structured_outputs.json"
        assert longest < 0.5
        assert http.post("/v1/completions", json=honest).json()["choices"][0]["text"].isdigit()
