"""A trace of conversations, scaled down to a small model: when which prompt arrives.

The file has one JSON object per line: `timestamp` in ms, `input_length` and `output_length` in
tokens, and `hash_ids`, one per block of 512 tokens of the prompt; equal ids are equal blocks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 8  # for 512 in the trace
PROMPT_DIVISOR = 512 // BLOCK_TOKENS
OUTPUT_DIVISOR = 8
MAX_PROMPT, MAX_OUTPUT = 500, 120
FIRST_ID, LAST_ID = 270, 500  # ordinary tokens of the demo model


@dataclass(frozen=True, slots=True)
class Arrival:
    """at_s: since the start."""

    at_s: float
    prompt: list[int]
    num_tokens: int


def read_trace(path: str | None, count: int, seconds: float) -> list[Arrival]:
    """The first `count` requests of a file, or of a trace made here, in `seconds`."""
    lines = Path(path).read_text().splitlines() if path else None
    records = list(map(json.loads, lines[:count])) if lines else list(made(count))
    first, last = records[0]["timestamp"], records[-1]["timestamp"]
    return [
        Arrival(
            seconds * (record["timestamp"] - first) / max(1, last - first),
            prompt_of(record["hash_ids"], record["input_length"]),
            min(MAX_OUTPUT, max(1, record["output_length"] // OUTPUT_DIVISOR)),
        )
        for record in records
    ]


def prompt_of(hash_ids: list[int], input_length: int) -> list[int]:
    """The prompt of these blocks, of which the last may be a part."""
    ids = [
        random.Random(block * BLOCK_TOKENS + i).randint(FIRST_ID, LAST_ID)
        for block in hash_ids[: MAX_PROMPT // BLOCK_TOKENS]
        for i in range(BLOCK_TOKENS)
    ]
    return ids[: max(1, min(MAX_PROMPT, input_length // PROMPT_DIVISOR))]


def made(count: int) -> Iterator[dict[str, Any]]:
    """Conversations whose turns repeat what was said before, a system prompt in front of all."""
    rng = random.Random(0)
    talks = [[0, 1, 2] for _ in range(20)]
    next_id, now = 3, 0.0
    for _ in range(count):
        now += rng.expovariate(1 / 300)
        number = rng.randrange(len(talks))
        talk = talks[number]
        new = range(next_id, next_id + rng.randint(1, 6))
        next_id = new.stop
        talk.extend(new)
        yield {
            "timestamp": int(now),
            "input_length": 512 * len(talk) - rng.randrange(512),
            "output_length": rng.randint(20, 900),
            "hash_ids": list(talk),
        }
        if len(talk) > 50:
            talks[number] = [0, 1, 2]
