"""Traffic of conversations for a fleet: a trace, or one made with the same features."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A file in Mooncake's form, how much of it, and how much faster it is played.
TRACE = os.environ.get("FLEET_TRACE")
TRACE_S = float(os.environ.get("FLEET_TRACE_S", "600"))
SPEED = float(os.environ.get("FLEET_SPEED", "6"))

DIVISOR = 8  # of lengths of prompts
OUTPUT_DIVISOR = 64
BLOCK_TOKENS = 512 // DIVISOR
# Ids with three digits: the router counts 4 bytes of `"270\n"` as a token.
FIRST_ID, LAST_ID = 100, 255
MAX_SEQ_LEN = 16384


@dataclass(frozen=True, slots=True)
class Arrival:
    """at_s: since the start."""

    at_s: float
    prompt: list[int]
    num_tokens: int


def arrivals() -> list[Arrival]:
    lines = Path(TRACE).read_text().splitlines() if TRACE else None
    records = map(json.loads, lines) if lines else made()
    return [
        Arrival(
            record["timestamp"] / 1000 / SPEED,
            prompt_of(record["hash_ids"], record["input_length"] // DIVISOR),
            max(1, record["output_length"] // OUTPUT_DIVISOR),
        )
        for record in records
        if record["timestamp"] < 1000 * TRACE_S
    ]


def prompt_of(hash_ids: list[int], num_tokens: int) -> list[int]:
    """The tokens of these blocks, of which the last may be a part."""
    ids: list[int] = []
    for block in hash_ids:
        ids += random.Random(block).choices(range(FIRST_ID, LAST_ID + 1), k=BLOCK_TOKENS)
    return ids[: max(1, min(num_tokens, MAX_SEQ_LEN - 100))]


def made() -> Iterator[dict[str, Any]]:
    """Long prompts at 3 per second; a third goes on with one of the last 200 conversations."""
    rng = random.Random(0)
    talks: list[list[int]] = []
    next_id, now = 1, 0.0
    while now < TRACE_S:
        now += rng.expovariate(3)
        if talks and rng.random() < 0.35:
            talk, added = rng.choice(talks[-200:]), rng.randint(1, 6)
        else:
            talk, added = [0], min(200, int(rng.lognormvariate(2.8, 0.8)) + 4)
            talks.append(talk)
        talk += range(next_id, next_id + added)
        next_id += added
        yield {
            "timestamp": int(1000 * now),
            "input_length": 512 * len(talk) - rng.randrange(512),
            "output_length": rng.randint(20, 700),
            "hash_ids": list(talk),
        }
