"""The parts of replies that belong to one uid, gathered until its reader takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from minisrv.errors import MinisrvError, RequestFailedError
from minisrv.wire.logprobs import PromptEcho, SpelledLogprobs
from minisrv.wire.messages import Failure, Finish, PrefillProgress, Start, UserReply


@dataclass(slots=True, repr=False)
class Event:
    """What arrived for `uid` since its last event: a late reader gets fewer, longer events.

    index: the choice of the request, its uid less the request's first.
    reasoning: text deltas of the reasoning, before all `deltas`; reasoning_tokens counts it so far,
    0 in an event without reasoning. output_tokens: the count so far.
    start: in the first event after prefill. progress: the latest of the prefill.
    token_ids: one per token of output, also of those that give no text.
    logprobs, echo: if requested; the echo comes before all deltas.
    started_at: by time.monotonic(). ended_at: of the last token, on the scheduler's clock, in the
    last event, which has a `finish` other than NONE, or a `failure`.
    """

    uid: int
    index: int
    deltas: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    reasoning_tokens: int = 0
    output_tokens: int = 0
    finish: Finish = Finish.NONE
    stop_reason: str | int | None = None
    start: Start | None = None
    failure: Failure | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[SpelledLogprobs] = field(default_factory=list)
    echo: PromptEcho | None = None
    progress: PrefillProgress | None = None
    started_at: float = 0.0
    ended_at: float | None = None

    def __repr__(self) -> str:
        end = "failure" if self.failure else self.finish.name
        return f"<Event {self.uid} {self.text!r} output_tokens={self.output_tokens} {end}>"

    @property
    def text(self) -> str:
        return "".join(self.deltas)

    @property
    def reasoning_text(self) -> str:
        return "".join(self.reasoning)

    @property
    def num_bytes(self) -> int:
        """About how many bytes a reply needs for what the event holds."""
        parts = sum(map(len, self.deltas)) + sum(map(len, self.reasoning)) + 8 * len(self.token_ids)
        entries = sum(len(part.tokens) + len(part.top_tokens) for part in self.logprobs)
        return parts + 64 * entries

    @property
    def final(self) -> bool:
        """Whether this is the last event of its uid."""
        return self.finish is not Finish.NONE or self.failure is not None

    def raise_failure(self) -> None:
        """Raise RequestFailedError if the uid has failed."""
        if self.failure is not None:
            raise failure_error(self.failure)


def gather_reply(
    reply: UserReply, event_of: Callable[[int], Event | None], now: float
) -> list[Event]:
    """Add the parts of a reply to the events of their uids; returns the final events.

    event_of: a uid's event, or None for a uid that is not open, whose parts are dropped. An abort
    becomes a failure. Raises ValueError for an unknown finish code.
    """
    ended = []
    for start in reply.starts:
        if event := event_of(start.uid):
            event.start, event.started_at = start, now
    for progress in reply.progress:
        if event := event_of(progress.uid):
            event.progress = progress
    for reasoning in reply.reasoning:
        if event := event_of(reasoning.uid):
            event.reasoning.append(reasoning.text)
            event.reasoning_tokens = reasoning.tokens
    for echo in reply.echoes:
        if event := event_of(echo.uid):
            event.echo = echo
    for logprobs in reply.logprobs:
        if event := event_of(logprobs.uid):
            event.logprobs.append(logprobs)
    for end in reply.ends:
        if event := event_of(end.uid):
            event.ended_at = end.at
    columns = (reply.uids.tolist(), reply.texts, reply.output_tokens.tolist())
    ends = (reply.finishes.tolist(), reply.stop_reasons)
    new_ids, num_ids = reply.new_ids.tolist(), 0
    rows = zip(*columns, *ends, reply.num_new_ids.tolist(), strict=True)
    for uid, text, output_tokens, finish, stop_reason, num_new_ids in rows:
        first_id, num_ids = num_ids, num_ids + num_new_ids
        if event := event_of(uid):
            event.deltas.append(text)
            event.output_tokens = output_tokens
            event.token_ids += new_ids[first_id:num_ids]
            if finish:
                ended.append(event)
                if finish == Finish.ABORT:
                    message = "the request was aborted by the server"
                    error = MinisrvError(message, code="request_aborted")
                    event.failure = Failure.from_error(uid, error)
                else:
                    event.finish, event.stop_reason = Finish(finish), stop_reason
    for failure in reply.failures:
        if event := event_of(failure.uid):
            event.failure = failure
            ended.append(event)
    return ended


def failure_error(failure: Failure) -> RequestFailedError:
    """The exception that carries `failure` to the client."""
    error = RequestFailedError(
        failure.message,
        status=failure.status,
        error_type=failure.error_type,
        code=failure.code,
        param=failure.param,
    )
    error.lengths = failure.lengths
    return error
