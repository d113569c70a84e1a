"""The share of each API key in the prompt tokens of a step, by deficit round robin.

Deficit round robin (Shreedhar and Varghese, 1995) over the keys that have prompts to compute: a key
gets a quantum at its turn, and what it could not use for lack of budget stays to its credit. The
turns go on where the step before ended. A prompt is computed in chunks of any length, so each key
gets its share in every step, however long the prompts of the others are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from minisrv.scheduler.request import Request
from minisrv.scheduler.waiting_queue import KeyQueue


class FairShares:
    """The turns of the keys, and their credit in tokens. A key without prompts has neither."""

    def __init__(self) -> None:
        self._turns: deque[int] = deque()
        self._credit: dict[int, int] = {}

    def divide(self, wanted: Mapping[int, int], budget: int) -> dict[int, int]:
        """The tokens of each key in a step, in the order of their turns.

        wanted: how many tokens each key could use, at least one; together they get all of the
        budget or all that they want.
        """
        for key in self._credit.keys() - wanted.keys():
            self._turns.remove(key)
            del self._credit[key]
        for key in wanted:
            if key not in self._credit:
                self._turns.append(key)
                self._credit[key] = 0
        shares = dict.fromkeys(self._turns, 0)
        missing = min(budget, sum(wanted.values()))
        quantum = max(1, budget // max(1, len(shares)))
        while missing:
            key = self._turns[0]
            self._turns.rotate(-1)
            open_ = wanted[key] - shares[key]
            if open_:
                self._credit[key] += quantum
            tokens = min(self._credit[key], open_, missing)
            shares[key] += tokens
            missing -= tokens
            self._credit[key] = self._credit[key] - tokens if tokens < open_ else 0
        return shares

    def put_first(self, keys: Sequence[int]) -> None:
        """Begin the next step with these keys, which could not use their turn in this one."""
        for key in reversed(keys):
            self._turns.remove(key)
            self._turns.appendleft(key)


def wanted_tokens(
    own: Mapping[int, list[Request]], queues: Mapping[int, KeyQueue], budget: int
) -> dict[int, int]:
    """The prompt tokens, up to `budget`, that each key could use in a step, cached ones included.

    own: the prompts being computed, by key. queues: the requests that may begin.
    """
    wanted = dict[int, int]()
    for key in dict.fromkeys([*own, *queues]):
        tokens = sum(len(r.prefill_ids) - r.num_computed for r in own.get(key, ()) if r.lease)
        for request in queues.get(key, ()):
            if tokens >= budget:
                break
            tokens += 0 if request.compiling else request.num_tokens
        if tokens:
            wanted[key] = min(tokens, budget)
    return wanted
