"""What agents send first, sent again: a stream merged by the client's code is the whole reply."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anthropic
import openai

from tests.clients.recorder import Recording
from tests.clients.running import Machine
from tests.clients.scripted_model import Conversation, Cut
from tests.clients.test_agents import Agent, each

DELTAS = ("response.output_text.delta", "response.function_call_arguments.delta")
OWN_IDS = ("id", "call_id", "created", "created_at", "completed_at", "item_id", "tool_use_id")


def replies(agent: Agent) -> list[str]:
    """Text, calls, both, and calls that are cut off after each of some lengths."""
    shell = agent.shell("printf '\u4f60\u597d \N{PARTY POPPER}\n' && ls")
    whole = "I look \N{EYES}.\n" + shell + "\n" + agent.shell("true")
    cuts = [Cut(whole[:length]) for length in range(12, len(whole), 23)]
    return ["Hello, \u4f60\u597d.", shell, whole, *cuts]


def chat(url: str, body: dict[str, Any]) -> tuple[Any, Any]:
    """The reply whole, and merged from a stream by the openai package."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    named: Any = {"model": body["model"], "messages": body["messages"]}
    rest = {k: v for k, v in body.items() if k not in ("stream", "stream_options")}
    whole = client.chat.completions.create(**named, extra_body=rest)
    with client.chat.completions.stream(**named, extra_body=rest) as stream:
        list(stream)
        merged = stream.current_completion_snapshot
    return whole.choices[0].to_dict(), merged.choices[0].to_dict()


def responses(url: str, body: dict[str, Any]) -> tuple[Any, Any]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    named: Any = {"model": body["model"], "input": body["input"]}
    rest = {k: v for k, v in body.items() if k != "stream"}
    whole = client.responses.create(**named, extra_body=rest)
    deltas: dict[int, str] = {}
    with client.responses.stream(**named, extra_body={**rest, "stream": True}) as stream:
        for event in stream:
            if event.type in (
                "response.output_text.delta",
                "response.function_call_arguments.delta",
            ):
                deltas[event.output_index] = deltas.get(event.output_index, "") + event.delta
            if event.type in ("response.completed", "response.incomplete"):
                merged = event.response
    said = [getattr(item, "arguments", None) or item.content[0].text for item in merged.output]
    assert said == list(deltas.values())
    fields = ("output", "status", "incomplete_details")
    return tuple({k: r.to_dict().get(k) for k in fields} for r in (whole, merged))


def messages(url: str, body: dict[str, Any]) -> tuple[Any, Any]:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60)
    named: Any = {name: body[name] for name in ("model", "messages", "max_tokens")}
    rest = {k: v for k, v in body.items() if k != "stream"}
    whole = client.messages.create(**named, extra_body=rest)
    with client.messages.stream(**named, extra_body=rest) as stream:
        merged = stream.get_final_message()
    fields = ("content", "stop_reason", "stop_sequence")
    return tuple({k: r.to_dict().get(k) for k in fields} for r in (whole, merged))


MERGE: dict[str, Callable[[str, dict[str, Any]], tuple[Any, Any]]] = {
    "/v1/chat/completions": chat,
    "/v1/responses": responses,
    "/v1/messages": messages,
}


def comparable(value: Any) -> Any:
    """Without ids, and without what is absent in one form and null in the other."""
    if isinstance(value, list):
        return [comparable(item) for item in value]
    if isinstance(value, dict):
        kept = {k: comparable(v) for k, v in value.items() if k not in OWN_IDS}
        return {k: v for k, v in kept.items() if v is not None and v != [] and k != "index"}
    return value


@each("its first prompt, sent again")
def test_the_merged_stream_of_a_first_prompt_is_the_whole_reply(
    agent: Agent,
    machine: Callable[[str], Machine],
    play: Callable[..., Recording],
) -> None:
    said = ""

    def script(conversation: Conversation) -> str:
        return said

    recording = play(script)
    said = "Hello."
    agent.run(machine(agent.client), recording)
    recorded = [e for e in recording.generations() if agent.tool in json.dumps(e.json.get("tools"))]
    first = recorded[0]
    assert first.status == 200, first.reply
    url = recording.url
    for said in replies(agent):
        whole, merged = MERGE[first.route](url, first.json)
        assert comparable(merged) == comparable(whole), said
