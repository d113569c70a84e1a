"""Pools of ids (pages, rows), which are reused only after the steps that use them have settled."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class IdPool:
    """The ids 0..size-1; each is free, quarantined, or held by a caller.

    Freeing has two phases: `release(ids, last_step)` quarantines ids that step `last_step` may
    still read or write; `settle(last_step)` frees them.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.settled_step = 0
        self._free = list(range(size - 1, -1, -1))
        self._quarantine: deque[tuple[int, list[int]]] = deque()
        self.num_quarantined = 0

    def __repr__(self) -> str:
        return f"IdPool({self.num_free} free, {self.num_quarantined} quarantined of {self.size})"

    @property
    def num_free(self) -> int:
        """Ids that `allocate` can return now."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free ids; the caller has checked that there are enough."""
        assert count <= len(self._free), "more ids allocated than are free"
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        return taken

    def release(self, ids: Iterable[int], last_step: int) -> None:
        """Return ids; they become free once `last_step` has settled."""
        if last_step <= self.settled_step:
            self._free.extend(ids)
            return
        held = list(ids)
        self._quarantine.append((last_step, held))
        self.num_quarantined += len(held)

    def settle(self, step: int) -> None:
        """All steps up to `step` are done; free the ids that were waiting for them."""
        self.settled_step = step
        still = deque[tuple[int, list[int]]]()
        for last_step, ids in self._quarantine:
            if last_step <= step:
                self._free.extend(ids)
                self.num_quarantined -= len(ids)
            else:
                still.append((last_step, ids))
        self._quarantine = still

    def idle_ids(self) -> list[int]:
        """All ids that no caller holds: free and quarantined. For consistency checks."""
        return self._free + [i for _, ids in self._quarantine for i in ids]
