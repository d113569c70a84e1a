"""What comes back for one uid, gathered until its reader takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from minisrv.errors import MinisrvError, RequestFailedError
from minisrv.wire.logprobs import PromptEcho, SpelledLogprobs
from minisrv.wire.messages import Failure, Finish, PrefillProgress, Start, UserReply


@dataclass(slots=True, repr=False)
class Event:
    """All that came for `uid` since the last event: a reader that is late gets fewer, longer ones.

    index: the choice of the request, its uid less the request's first.
    reasoning: text deltas of the reply's reasoning, before all `deltas`. reasoning_tokens: its
    count so far, 0 in an event without reasoning.
    output_tokens: the count so far. `start` is set in the first event that follows the prompt.
    token_ids and logprobs: of the output's tokens, where the request asked for them. echo: of the
    prompt, likewise, before all deltas. progress: the prompt's latest. started_at is on the
    clock of the event loop; decode_s, when the uid has ended, from its first token to its last. The
    last event of a uid has a `finish` other than NONE, or a `failure`.
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
    decode_s: float | None = None

    def __repr__(self) -> str:
        end = "failure" if self.failure else self.finish.name
        return f"<Event {self.uid} {self.text!r} output_tokens={self.output_tokens} {end}>"

    @property
    def text(self) -> str:
        """The text that came since the last event."""
        return "".join(self.deltas)

    @property
    def reasoning_text(self) -> str:
        """The reasoning text that arrived since the last event."""
        return "".join(self.reasoning)

    @property
    def final(self) -> bool:
        """Nothing follows for this uid."""
        return self.finish is not Finish.NONE or self.failure is not None

    def end(self, finish: Finish, stop_reason: str | int | None) -> None:
        """Make this the last event of its uid."""
        if finish is Finish.ABORT:
            error = MinisrvError("the request was aborted by the server", code="request_aborted")
            self.failure = Failure.from_error(self.uid, error)
        else:
            self.finish, self.stop_reason = finish, stop_reason

    def raise_failure(self) -> None:
        """Raise RequestFailedError if the uid has failed."""
        if self.failure is not None:
            raise failure_error(self.failure)


def gather_reply(
    reply: UserReply, event_of: Callable[[int], Event | None], now: float
) -> list[Event]:
    """Put the parts of a reply into the events of their uids; returns the final ones.

    event_of: a uid's event, None for a uid that is not open, whose parts are dropped. An abort
    that the server decided on becomes a failure. Raises ValueError for an unknown finish code.
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
    for output in reply.output_ids:
        if event := event_of(output.uid):
            event.token_ids += output.ids.tolist()
    for echo in reply.echoes:
        if event := event_of(echo.uid):
            event.echo = echo
    for logprobs in reply.logprobs:
        if event := event_of(logprobs.uid):
            event.logprobs.append(logprobs)
    for end in reply.ends:
        if event := event_of(end.uid):
            event.decode_s = end.decode_s
    columns = (reply.uids.tolist(), reply.texts, reply.output_tokens.tolist())
    ends = (reply.finishes.tolist(), reply.stop_reasons)
    for uid, text, output_tokens, finish, stop_reason in zip(*columns, *ends, strict=True):
        if event := event_of(uid):
            event.deltas.append(text)
            event.output_tokens = output_tokens
            if finish:
                event.end(Finish(finish), stop_reason)
                ended.append(event)
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
