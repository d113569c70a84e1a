"""POST /v1/responses over HTTP, as the `openai` package reads it."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest
from http_server import HttpServer, serve
from openai.types.responses import Response, ResponseStreamEvent
from played_model import TEMPLATES, PlayedModel
from scripted_backend import TEXT

PATH = "/v1/responses"
TOOLS: list[Any] = [
    {
        "type": "function",
        "name": name,
        "description": "Tell it.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
        "strict": False,
    }
    for name in ("get_time", "add")
]
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
# What differs from one reply to the next.
IDS = {"id", "created_at", "completed_at", "call_id"}


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, HttpServer]]:
    made = {}
    contexts = []
    for name, template in TEMPLATES.items():
        context = serve(make_backend=functools.partial(PlayedModel, template=template))
        contexts.append(context)
        made[name] = context.__enter__()
    yield made
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.fixture
def hermes(servers: dict[str, HttpServer]) -> HttpServer:
    return servers["hermes"]


def play(server: HttpServer, text: str) -> Any:
    """The back end, which will say `text`."""
    server.backend.text = text  # type: ignore[attr-defined]
    return server.backend


def whole(server: HttpServer, **body: Any) -> Response:
    response = server.http.post(PATH, json={"input": "hi", **body})
    assert response.status_code == 200, response.text
    return Response.model_validate_json(response.content, strict=True)


def events(server: HttpServer, **body: Any) -> list[Any]:
    """The events of a stream, each of which has its name twice and its number."""
    response = server.http.post(PATH, json={"input": "hi", "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *frames, rest = response.content.decode().split("\n\n")
    assert rest == ""
    read = []
    for i, frame in enumerate(frames):
        name, data = frame.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        assert value["sequence_number"] == i
        read.append(EVENT.validate_python(value, strict=True))
    return read


def plain(value: Any) -> Any:
    """A reply without what differs from one to the next."""
    if isinstance(value, pydantic.BaseModel):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items() if name not in IDS}
    return [plain(part) for part in value] if isinstance(value, list) else value


def joined(stream: list[Any]) -> list[dict[str, Any]]:
    """The items of a stream, put together from its deltas alone; checks the order of events."""
    items: list[dict[str, Any]] = []
    expected = ["response.created", "response.in_progress"]
    for event in stream[2:-1]:
        name = event.type.removeprefix("response.")
        if name == "output_item.added":
            assert event.output_index == len(items)
            items.append(event.item.model_dump(exclude_unset=True))
            expected += [event.type]
            continue
        item = items[-1]
        assert event.output_index == len(items) - 1
        if name == "output_item.done":
            assert event.item.id == item["id"]
            item["status"] = event.item.status
            assert event.item.model_dump(exclude_unset=True) == item
            continue
        assert event.item_id == item["id"]
        if name == "content_part.added":
            item["content"].append(event.part.model_dump(exclude_unset=True))
        elif name == "content_part.done":
            assert event.part.model_dump(exclude_unset=True) == item["content"][0]
        elif name == "function_call_arguments.delta":
            item["arguments"] += event.delta
        elif name == "function_call_arguments.done":
            assert event.arguments == item["arguments"]
        elif name.endswith("_text.delta"):
            item["content"][event.content_index]["text"] += event.delta
        else:
            assert name in ("output_text.done", "reasoning_text.done")
            assert event.text == item["content"][event.content_index]["text"]
    assert [event.type for event in stream[:2]] == expected[:2]
    return items


def test_a_text_is_answered(server: HttpServer) -> None:
    response = server.openai.responses.create(model="org/tiny", input="hi")
    assert response.output_text == TEXT
    assert response.status == "completed"
    assert whole(server).usage is not None
