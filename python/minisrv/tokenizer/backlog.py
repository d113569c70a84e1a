"""What a tokenizer process has received and not yet begun, oldest first."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from minisrv.errors import MinisrvError
from minisrv.wire.messages import (
    AbortMsg,
    AnswerMsg,
    Failure,
    FlushMsg,
    TokenizeMsg,
    TokenizerQuery,
    UserReply,
    failure_reply,
)

Work = TokenizeMsg | TokenizerQuery | FlushMsg


class Backlog:
    """An abort removes its requests and queries from here without waiting for its turn.

    taken_bytes: in the frames of work that was begun or removed, since it was last set to 0.
    """

    def __init__(self) -> None:
        self._work: deque[tuple[Work, int]] = deque()
        self.taken_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._work)

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
                self._work.append((message, num_bytes))
        return self._remove(aborted) if aborted else []

    def take(self) -> Work:
        """The oldest work, to be done now."""
        work, num_bytes = self._work.popleft()
        self.taken_bytes += num_bytes
        return work

    def _remove(self, uids: set[int]) -> list[UserReply | AnswerMsg | AbortMsg]:
        kept: deque[tuple[Work, int]] = deque()
        finals: list[UserReply | AnswerMsg | AbortMsg] = []
        for work, num_bytes in self._work:
            number = work.uid if isinstance(work, TokenizeMsg) else work.query
            if number not in uids or isinstance(work, FlushMsg):
                kept.append((work, num_bytes))
                continue
            uids -= _uids_of(work)
            finals.append(_aborted(work))
            self.taken_bytes += num_bytes
        self._work = kept
        return [*finals, AbortMsg(uids=tuple(sorted(uids)))] if uids else finals


def _uids_of(work: Work) -> set[int]:
    if isinstance(work, TokenizeMsg):
        return set(range(work.uid, work.uid + work.sampling.n))
    return {work.query}


def _aborted(work: Work) -> UserReply | AnswerMsg:
    error = MinisrvError("the request was aborted by the server", code="request_aborted")
    if isinstance(work, TokenizeMsg):
        return failure_reply([Failure.from_error(uid, error) for uid in sorted(_uids_of(work))])
    return AnswerMsg(query=work.query, failure=Failure.from_error(0, error))
