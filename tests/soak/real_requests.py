"""Requests of every kind to a server with a real checkpoint, and what their replies must repeat."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from minisrv.sampling_params import SamplingParams
from tests.soak.hash_texts import WrongReply
from tests.soak.raw_http import Connection, Reply, json_request
from tests.support.checkpoints import CHAT_TEMPLATE, make_checkpoint
from tests.support.sampled_oracle import closest_call

LOGPROB_TOLERANCE = 1e-4
# Rounding depends on the sizes of the batches, so that a closer call may be decided either way.
LEAST_CALL = 5e-6
SAMPLING_FIELDS = {
    *("temperature", "seed", "frequency_penalty", "presence_penalty", "repetition_penalty"),
}
TOOL_MARKS = "{% if tools %}{{ tools | tojson }}<tool_call></tool_call>{% endif %}"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 60, "maxLength": 90},
        "notes": {
            "type": "array",
            "items": {"type": "string", "maxLength": 20},
            "minItems": 5,
            "maxItems": 9,
        },
    },
    "required": ["name", "notes"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "save", "parameters": PERSON}}]


def make_tool_checkpoint(path: Path) -> Path:
    """A small checkpoint with random weights whose template takes tools."""
    make_checkpoint(path, "qwen3")
    (path / "chat_template.jinja").write_text(TOOL_MARKS + CHAT_TEMPLATE)
    return path


@dataclass
class Choice:
    """One choice of a reply; its parts come one by one in a stream.

    tokens, logprobs: each token and its alternatives, if asked for.
    """

    text: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    finish: str = ""
    stop_reason: Any = None
    token_ids: list[int] = field(default_factory=list)
    tokens: list[tuple[str, ...]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, data: dict[str, Any]) -> None:
        """Append what a chunk or a whole reply has of the choice."""
        message = data.get("delta") or data.get("message") or {}
        self.text += message.get("content") or data.get("text") or ""
        for i, call in enumerate(message.get("tool_calls") or ()):
            parts = self.calls.setdefault(call.get("index", i), ["", ""])
            parts[0] += call["function"].get("name") or ""
            parts[1] += call["function"].get("arguments") or ""
        self.token_ids += data.get("token_ids") or ()
        self._add_logprobs(data.get("logprobs") or {})
        if data["finish_reason"]:
            assert not self.finish, "a choice ends twice"
            self.finish, self.stop_reason = data["finish_reason"], data.get("stop_reason")

    def _add_logprobs(self, logprobs: dict[str, Any]) -> None:
        for one in logprobs.get("content") or ():
            self.tokens.append((one["token"], *(other["token"] for other in one["top_logprobs"])))
            self.logprobs += (token["logprob"] for token in (one, *one["top_logprobs"]))
        for token, logprob, others in zip(
            logprobs.get("tokens") or (),
            logprobs.get("token_logprobs") or (),
            logprobs.get("top_logprobs") or (),
            strict=True,
        ):
            self.tokens.append((token, *others))
            self.logprobs += (logprob, *others.values())

    @property
    def exact(self) -> tuple[Any, ...]:
        """All but the logprobs."""
        calls = sorted(self.calls.items())
        return self.text, calls, self.finish, self.stop_reason, self.token_ids, self.tokens


@dataclass
class Outcome:
    """A whole reply. prompt_tokens and completion_tokens are those of its usage."""

    choices: dict[int, Choice]
    prompt_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def of(cls, reply: Reply) -> Outcome:
        """Raises WrongReply if the reply is not a whole one without an error."""
        if reply.status != 200:
            raise WrongReply(f"status {reply.status}: {reply.body[:300]!r}")
        if not reply.is_stream:
            return cls._join([reply.json()])
        events = reply.events
        if not events or events[-1] != "[DONE]":
            raise WrongReply(f"the stream ends with {events[-1:]}")
        return cls._join([json.loads(event) for event in events[:-1]])

    @classmethod
    def _join(cls, parts: list[dict[str, Any]]) -> Outcome:
        outcome = cls({})
        for part in parts:
            if "error" in part:
                raise WrongReply(f"an error event: {part}")
            outcome.prompt_ids = part.get("prompt_token_ids") or outcome.prompt_ids
            for data in part["choices"]:
                outcome.prompt_ids = data.get("prompt_token_ids") or outcome.prompt_ids
                outcome.choices.setdefault(data["index"], Choice()).add(data)
            if usage := part.get("usage"):
                outcome.prompt_tokens = usage["prompt_tokens"]
                outcome.completion_tokens = usage["completion_tokens"]
        if not all(choice.finish for choice in outcome.choices.values()):
            raise WrongReply("a choice does not end")
        return outcome

    def check(self, other: Outcome) -> None:
        """Raises WrongReply unless `other` is the same, with logprobs within the tolerance."""
        counts = [(one.prompt_tokens, one.completion_tokens) for one in (self, other)]
        if counts[0] != counts[1] or self.choices.keys() != other.choices.keys():
            raise WrongReply(f"{counts[1]} tokens instead of {counts[0]}")
        for index, choice in self.choices.items():
            found = other.choices[index]
            for ours, theirs in zip(choice.exact, found.exact, strict=True):
                if ours != theirs:
                    raise WrongReply(f"choice {index}: {difference(ours, theirs)}")
            pairs = zip(choice.logprobs, found.logprobs, strict=True)
            worst = max((abs(a - b) for a, b in pairs), default=0.0)
            if worst > LOGPROB_TOLERANCE:
                raise WrongReply(f"choice {index}: a logprob differs by {worst}")


def difference(expected: Any, found: Any) -> str:
    """Where two strings or lists begin to differ."""
    if not isinstance(expected, str | list):
        return f"{found!r} instead of {expected!r}"
    pairs = enumerate(zip(expected, found, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))
    begin, end = max(0, at - 2), at + 4
    return f"{found[begin:end]!r} instead of {expected[begin:end]!r} at {at} of {len(expected)}"


@dataclass
class RealRequest:
    """expected: the reply when nothing was killed."""

    name: str
    path: str
    body: dict[str, Any]
    expected: Outcome | None = None

    @property
    def data(self) -> bytes:
        return json_request(self.path, self.body)

    def check(self, reply: Reply) -> None:
        """Raises WrongReply unless the reply is the expected one."""
        assert self.expected is not None
        self.expected.check(Outcome.of(reply))

    def closest_call(self, model: PreTrainedModel) -> float:
        """See sampled_oracle. Infinite under a grammar, of which the oracle knows nothing; there
        close calls are rare because few tokens may follow.
        """
        if self.body.keys() & {"response_format", "tools"}:
            return math.inf
        assert self.expected is not None
        given = {name: self.body[name] for name in SAMPLING_FIELDS & self.body.keys()}
        params = SamplingParams(**given)
        prompt, choices = self.expected.prompt_ids, self.expected.choices.items()
        return min(closest_call(model, prompt, c.token_ids, params, i) for i, c in choices)


def make_requests(rng: random.Random) -> list[RealRequest]:
    """One of each kind, streamed and whole; those with stop strings come from `stop_requests`."""

    def text() -> str:
        return "".join(rng.choices("abcdefghij klmnop", k=rng.randint(5, 60)))

    def seeded(**fields: Any) -> dict[str, Any]:
        return {"temperature": 1.0, "seed": rng.randrange(1 << 40), **fields}

    def schema(name: str) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": name, "schema": PERSON}}

    completions: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0, "max_tokens": 230},
        "seeded": seeded(max_tokens=250),
        "n=4": seeded(n=4, max_tokens=140),
        "penalties": seeded(
            max_tokens=180, frequency_penalty=0.7, presence_penalty=0.4, repetition_penalty=1.2
        ),
        "logprobs": seeded(max_tokens=150, logprobs=3),
    }
    chats: dict[str, dict[str, Any]] = {
        "chat": {"temperature": 0, "max_tokens": 240, "ignore_eos": True},
        "schema": seeded(response_format=schema("person"), top_k=4, max_tokens=400),
        "tools": seeded(tools=TOOLS, tool_choice="required", top_k=4, max_tokens=400),
        "chat logprobs": seeded(
            n=2, logprobs=True, top_logprobs=2, max_tokens=120, ignore_eos=True
        ),
    }
    requests = [
        RealRequest(name, "/v1/completions", {"prompt": text(), "ignore_eos": True, **body})
        for name, body in completions.items()
    ] + [
        RealRequest(
            name,
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": text()}], **body},
        )
        for name, body in chats.items()
    ]
    return [way for request in requests for way in streamed_and_whole(request)]


def stop_requests(greedy: RealRequest) -> list[RealRequest]:
    """The same with stop strings: some that only begin in its text, and are held, and one that ends
    it late."""
    assert greedy.expected is not None
    text = greedy.expected.choices[0].text
    begun = [text[i : i + 2] + "\x01\x02" for i in range(10, len(text) * 2 // 3, 40)][:3]
    late = text[len(text) * 3 // 4 :][:4]
    request = RealRequest("stop", greedy.path, {**greedy.body, "stop": [*begun, late]})
    return streamed_and_whole(request)


def streamed_and_whole(request: RealRequest) -> list[RealRequest]:
    body = {**request.body, "return_token_ids": True, "stream": False}
    stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
    return [
        RealRequest(f"{request.name} streamed", request.path, stream),
        RealRequest(request.name, request.path, body),
    ]


async def run_uncut(
    address: tuple[str, int],
    requests: list[RealRequest],
    model: PreTrainedModel,
    rng: random.Random,
) -> None:
    """Send the requests one after another, and take their replies as the expected ones.

    A request with a close call is given another seed.
    """
    for request in requests:
        while request.expected is None or request.closest_call(model) < LEAST_CALL:
            if request.expected is not None:
                request.body["seed"] = rng.randrange(1 << 40)
            with await Connection.open(*address) as connection:
                await connection.send(request.data)
                request.expected = Outcome.of(await connection.read_reply())
