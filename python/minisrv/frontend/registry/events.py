"""What comes back for one uid, gathered until its reader takes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from minisrv.errors import RequestFailedError
from minisrv.wire.logprobs import PromptEcho, SpelledLogprobs
from minisrv.wire.messages import Failure, Finish, Progress, Start


@dataclass(slots=True)
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
    progress: Progress | None = None
    started_at: float = 0.0
    decode_s: float | None = None

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

    def raise_failure(self) -> None:
        """Raise RequestFailedError if the uid has failed."""
        if self.failure is not None:
            raise failure_error(self.failure)


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
