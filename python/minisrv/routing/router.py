"""Which of several servers a request is sent to. Knows no transport: no I/O and no clock."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from minisrv.routing.prefix_index import PrefixIndex

MAX_SESSIONS = 10_000


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as a router sees it.

    blocks: one number for each `block_tokens` tokens, the last block may be a part. Each stands for
    its block and all before it, so that equal numbers are equal beginnings (`hash_blocks`).
    session: what the client calls the conversation; empty if it does not.
    """

    blocks: Sequence[int]
    num_tokens: int
    block_tokens: int
    session: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What is known of a server when a request arrives.

    queued_tokens: of prompts that it has accepted, those that it has still to compute, without
    cached ones. open_requests: those that have not ended. prefill_rate: prompt tokens per second.
    """

    queued_tokens: int
    open_requests: int
    prefill_rate: float


class Router(Protocol):
    """Replicas have numbers, which stay the same while they live."""

    def choose(self, prompt: Prompt, loads: Mapping[int, ReplicaLoad], now: float) -> int:
        """The replica for a prompt. loads: those that are ready, at least one. now: seconds."""

    def record(self, replica: int, prompt: Prompt, now: float) -> None:
        """The prompt has been sent to this replica."""

    def forget(self, replica: int) -> None:
        """The replica has ended, or has lost its cache."""


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._turns = count()

    def choose(self, prompt: Prompt, loads: Mapping[int, ReplicaLoad], now: float) -> int:
        """See Router."""
        return sorted(loads)[next(self._turns) % len(loads)]

    def record(self, replica: int, prompt: Prompt, now: float) -> None:
        """See Router; nothing is remembered."""

    def forget(self, replica: int) -> None:
        """See Router; nothing is remembered."""


class PowerOfTwo:
    """The one with fewer queued tokens of two drawn at random (Mitzenmacher, 2001)."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def choose(self, prompt: Prompt, loads: Mapping[int, ReplicaLoad], now: float) -> int:
        """See Router. With equally many, the one with fewer open requests."""
        drawn = self._random.sample(sorted(loads), min(2, len(loads)))
        return min(drawn, key=lambda i: (loads[i].queued_tokens, loads[i].open_requests))

    def record(self, replica: int, prompt: Prompt, now: float) -> None:
        """See Router; nothing is remembered."""

    def forget(self, replica: int) -> None:
        """See Router; nothing is remembered."""


class CostRouter:
    """The one on which the prompt is done first, by what is queued there and what is cached there.

    What is cached is taken from what was sent: `index` keeps the last blocks of each replica, as
    many as fit into its cache. Its owner may correct it, for example from a server's own reports.
    Where the MAX_SESSIONS most recent sessions were sent decides among equal waits only.
    """

    def __init__(self, index: PrefixIndex) -> None:
        self.index = index
        self._sessions: OrderedDict[str, int] = OrderedDict()

    def choose(self, prompt: Prompt, loads: Mapping[int, ReplicaLoad], now: float) -> int:
        """See Router.

        Among equal ones that of the session, then the least busy, then the one with the emptiest
        cache.
        """
        last = self._sessions.get(prompt.session)

        def cost(i: int) -> tuple[float, ...]:
            wait_s = self.wait_s(i, prompt, loads[i])
            return wait_s, i != last, loads[i].open_requests, self.index.num_blocks(i), i

        return min(loads, key=cost)

    def wait_s(self, replica: int, prompt: Prompt, load: ReplicaLoad) -> float:
        """Estimated seconds until a replica has computed a prompt that is sent to it now."""
        cached = self.index.num_matching(replica, prompt.blocks) * prompt.block_tokens
        own = prompt.num_tokens - min(cached, prompt.num_tokens - 1)
        return (own + load.queued_tokens) / load.prefill_rate

    def record(self, replica: int, prompt: Prompt, now: float) -> None:
        """See Router."""
        self.index.add(replica, prompt.blocks)
        if prompt.session:
            self._sessions[prompt.session] = replica
            self._sessions.move_to_end(prompt.session)
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)

    def forget(self, replica: int) -> None:
        """See Router. Sessions that were sent there keep its number, which no other one gets."""
        self.index.forget(replica)
