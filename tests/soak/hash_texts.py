"""Requests to a server with the hash engine, and the replies that they must get."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tests.soak.raw_http import Reply
from tests.support.hash_engine import expected_output

_STEMS = [
    "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz ,.", k=160))
    for seed in range(12)
]


class WrongReply(Exception):
    """A reply that differs from what the oracle says."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one choice must be."""

    text: str
    finish: str


@dataclass(frozen=True, slots=True)
class HashRequest:
    """answers: one per choice, in the order of their index."""

    path: str
    body: dict[str, Any]
    answers: tuple[Answer, ...]

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    def check(self, reply: Reply) -> None:
        """Raises WrongReply unless the whole reply is what the oracle says."""
        if reply.status != 200:
            raise WrongReply(f"status {reply.status}: {reply.body[:300]!r}")
        found = self._streamed(reply) if self.streams else self._whole(reply)
        if found != list(self.answers):
            raise WrongReply(f"{found} instead of {list(self.answers)}")

    def check_beginning(self, reply: Reply) -> None:
        """Raises WrongReply unless what has arrived of a stream begins as the oracle says."""
        texts, _ = self._joined(reply.events)
        for text, answer in zip(texts, self.answers, strict=True):
            if not answer.text.startswith(text):
                raise WrongReply(f"{text!r} does not begin {answer.text!r}")

    def _whole(self, reply: Reply) -> list[Answer]:
        choices = sorted(reply.json()["choices"], key=lambda choice: choice["index"])
        return [
            Answer(choice["message"]["content"] or "", choice["finish_reason"])
            if "message" in choice
            else Answer(choice["text"], choice["finish_reason"])
            for choice in choices
        ]

    def _streamed(self, reply: Reply) -> list[Answer]:
        events = reply.events
        if not events or events[-1] != "[DONE]":
            raise WrongReply(f"the stream ends with {events[-1:]}")
        texts, finishes = self._joined(events)
        return [Answer(text, finish) for text, finish in zip(texts, finishes, strict=True)]

    def _joined(self, events: Sequence[str]) -> tuple[list[str], list[str]]:
        texts, finishes = [""] * len(self.answers), [""] * len(self.answers)
        for event in events:
            if event == "[DONE]":
                continue
            data = json.loads(event)
            if "error" in data:
                raise WrongReply(f"an error event: {event}")
            for choice in data["choices"]:
                index = choice["index"]
                part = choice["delta"].get("content") if "delta" in choice else choice["text"]
                texts[index] += part or ""
                if choice["finish_reason"]:
                    finishes[index] = choice["finish_reason"]
        return texts, finishes


class RequestMaker:
    """Makes random requests that share prefixes.

    The answers to chats hold for a template that writes the content of the messages only.
    """

    def __init__(self, model_dir: Path) -> None:
        config = json.loads((model_dir / "config.json").read_text())
        self._vocab_size, self._eos_id = config["vocab_size"], config["eos_token_id"]
        self._tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))

    def make(
        self,
        rng: random.Random,
        *,
        stream: bool,
        max_tokens: tuple[int, int] = (1, 16),
        chats: bool = True,
        ignore_eos: bool = False,
    ) -> HashRequest:
        """A completion of one or two prompts, or with `chats` a chat, with one or two choices.

        max_tokens: the least and the most.
        """
        count = rng.randint(*max_tokens)
        n = rng.choice([1, 1, 1, 2])
        body = {"max_tokens": count, "n": n, "stream": stream, "ignore_eos": ignore_eos}
        prompts = [self._prompt(rng) for _ in range(rng.choice([1, 1, 2]))]
        answers = tuple(self._answer(p, count, ignore_eos) for p in prompts for _ in range(n))
        if chats and rng.random() < 0.4:
            body["messages"] = [{"role": "user", "content": prompts[0]}]
            return HashRequest("/v1/chat/completions", body, answers[:n])
        body["prompt"] = prompts if len(prompts) > 1 else prompts[0]
        if rng.random() < 0.3:
            body["prompt"] = [self._tokenizer.encode(prompt).ids for prompt in prompts]
        return HashRequest("/v1/completions", body, answers)

    def _prompt(self, rng: random.Random) -> str:
        stem = rng.choice(_STEMS)[: rng.randint(1, 160)]
        return stem + "".join(rng.choices("xyzäß中", k=rng.randint(0, 12)))

    def _answer(self, prompt: str, count: int, ignore_eos: bool) -> Answer:
        stop = () if ignore_eos else (self._eos_id,)
        ids = expected_output(self._tokenizer.encode(prompt).ids, count, self._vocab_size, stop)
        ended = bool(stop) and ids[-1] == self._eos_id
        return Answer(self._tokenizer.decode(ids), "stop" if ended else "length")
