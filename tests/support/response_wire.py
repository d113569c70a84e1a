"""Requests to /v1/responses and what comes back, read by the types of the `openai` package."""

import json
from typing import Any

import pydantic
from openai.types.responses import Response, ResponseStreamEvent

from tests.support.http_server import HttpServer

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
CALL = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "UTC"}}\n</tool_call>'
USER: dict[str, Any] = {"role": "user", "content": "hi"}
CALL_ITEM = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
OUTPUT_ITEM = {"type": "function_call_output", "call_id": "c1", "output": "2"}
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
# What differs from one reply to the next.
IDS = {"id", "created_at", "completed_at", "call_id"}


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
    kinds = [event.type.removeprefix("response.") for event in stream]
    assert kinds[:2] == ["created", "in_progress"]
    assert kinds[-1] in ("completed", "incomplete")
    for kind, event in zip(kinds[2:-1], stream[2:-1], strict=True):
        if kind == "output_item.added":
            assert event.output_index == len(items)
            assert not items or items[-1]["status"] == "completed"
            items.append(event.item.model_dump(exclude_unset=True))
            assert items[-1]["status"] == "in_progress"
            continue
        assert event.output_index == len(items) - 1
        if kind == "output_item.done":
            items[-1]["status"] = event.item.status
            assert event.item.model_dump(exclude_unset=True) == items[-1]
            continue
        assert event.item_id == items[-1]["id"]
        add_content(items[-1], kind, event)
    return items


def add_content(item: dict[str, Any], kind: str, event: Any) -> None:
    match kind:
        case "content_part.added":
            assert event.content_index == len(item["content"]) == 0
            item["content"].append(event.part.model_dump(exclude_unset=True))
        case "content_part.done":
            assert event.part.model_dump(exclude_unset=True) == item["content"][0]
        case "function_call_arguments.delta":
            item["arguments"] += event.delta
        case "function_call_arguments.done":
            assert event.arguments == item["arguments"]
        case "custom_tool_call_input.delta":
            item["input"] += event.delta
        case "custom_tool_call_input.done":
            assert event.input == item["input"]
        case "output_text.delta" | "reasoning_text.delta":
            item["content"][event.content_index]["text"] += event.delta
        case _:
            assert kind in ("output_text.done", "reasoning_text.done")
            assert event.text == item["content"][event.content_index]["text"]


def shape(items: list[Any]) -> list[Any]:
    """Kind, status, and text or name and arguments of each item; custom calls have no status."""
    shown: list[Any] = []
    for item in items:
        if item.type == "function_call":
            shown.append((item.type, item.status, item.name, item.arguments))
        elif item.type == "custom_tool_call":
            shown.append((item.type, item.name, item.input))
        else:
            shown.append((item.type, item.status, item.content[0].text))
    return shown


def post(server: HttpServer, **body: Any) -> Any:
    return server.http.post(PATH, json={"input": "hi", **body})


def error_of(response: Any) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    return error


def last_request(server: HttpServer, **body: Any) -> Any:
    """What the tokenizer is asked for."""
    assert post(server, **body).status_code == 200
    return server.backend.requests[-1]
