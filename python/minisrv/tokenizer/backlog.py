"""What a tokenizer process has received and not yet begun."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from minisrv.errors import MinisrvError
from minisrv.wire.failures import failure_reply
from minisrv.wire.messages import (
    AbortMsg,
    AnswerMsg,
    Failure,
    FlushMsg,
    TokenizeMsg,
    TokenizerQuery,
    UserReply,
)

Work = TokenizeMsg | TokenizerQuery | FlushMsg


@dataclass(frozen=True, slots=True)
class _Waiting:
    """number: its place by arrival. num_bytes: of its frame."""

    number: int
    work: Work
    num_bytes: int


class Backlog:
    """Work in the order of arrival; with fair keys, the API keys take turns.

    A flush of the cache waits for all that came before it. An abort removes its requests and
    queries from here without waiting for its turn.
    taken_bytes: in the frames of work that was begun or removed, since it was last set to 0.
    """

    def __init__(self) -> None:
        self._queues: dict[int, deque[_Waiting]] = {}  # by key, in the order of their turns
        self._flushes: deque[_Waiting] = deque()
        self._num_added = 0
        self.taken_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._queues or self._flushes)

    def add(
        self, messages: Iterable[tuple[Work | AbortMsg, int]]
    ) -> list[UserReply | AnswerMsg | AbortMsg]:
        """Add messages with the bytes of their frames. Returns what is to be sent at once.

        That is the final of each request or query that was removed, and an abort of the uids that
        are not here: they are on their way to the scheduler already.
        """
        aborted: set[int] = set()
        for message, num_bytes in messages:
            if isinstance(message, AbortMsg):
                self.taken_bytes += num_bytes
                aborted.update(message.uids)
            else:
                self._append(message, num_bytes)
        return self._remove(aborted) if aborted else []

    def clear(self) -> None:
        """Remove all work: nobody waits for it any more."""
        self._queues.clear()
        self._flushes.clear()
        self.taken_bytes = 0

    def take(self) -> Work:
        """The work whose turn it is."""
        before = self._flushes[0].number if self._flushes else None
        if before is not None and all(q[0].number > before for q in self._queues.values()):
            waiting = self._flushes.popleft()
        else:
            key, queue = next(iter(self._queues.items()))
            waiting = queue.popleft()
            del self._queues[key]
            if queue:
                self._queues[key] = queue
        self.taken_bytes += waiting.num_bytes
        return waiting.work

    def _append(self, work: Work, num_bytes: int) -> None:
        self._num_added += 1
        waiting = _Waiting(self._num_added, work, num_bytes)
        if isinstance(work, FlushMsg):
            self._flushes.append(waiting)
        else:
            key = work.key if isinstance(work, TokenizeMsg) else 0
            self._queues.setdefault(key, deque()).append(waiting)

    def _remove(self, uids: set[int]) -> list[UserReply | AnswerMsg | AbortMsg]:
        finals: list[UserReply | AnswerMsg | AbortMsg] = []
        for key, queue in list(self._queues.items()):
            kept: deque[_Waiting] = deque()
            for waiting in queue:
                if uids.isdisjoint(uids_of(waiting.work)):
                    kept.append(waiting)
                    continue
                uids -= uids_of(waiting.work)
                finals.append(_aborted(waiting.work))
                self.taken_bytes += waiting.num_bytes
            if kept:
                self._queues[key] = kept
            else:
                del self._queues[key]
        return [*finals, AbortMsg(uids=tuple(sorted(uids)))] if uids else finals


def uids_of(work: Work) -> set[int]:
    """Those of the choices of a request, or the number of a query."""
    if isinstance(work, TokenizeMsg):
        return set(range(work.uid, work.uid + work.sampling.n))
    return {work.query}


def _aborted(work: Work) -> UserReply | AnswerMsg:
    error = MinisrvError("the request was aborted by the server", code="request_aborted")
    if isinstance(work, TokenizeMsg):
        return failure_reply([Failure.from_error(uid, error) for uid in sorted(uids_of(work))])
    return AnswerMsg(query=work.query, failure=Failure.from_error(0, error))
