"""What the loop counts of its steps, for the frontend's metrics. Nothing here is done per token."""

from __future__ import annotations

from minisrv.scheduler.replies import Replies
from minisrv.scheduler.scheduler import Scheduler
from minisrv.scheduler.step import Step
from minisrv.wire.histogram import SECONDS, TOKENS, HistogramCounter
from minisrv.wire.messages import Finish, StatsMsg

PERIOD_S = 0.5


class LoopStats:
    """Counts since the start, and when they are due to be sent.

    A decode's time since its last token is that since the last step was settled: all that decode
    are in every step, but for one that waits for a page, whose wait counts as one step.
    """

    def __init__(self) -> None:
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._output_tokens = 0
        self._steps = 0
        self._inter_token = HistogramCounter(SECONDS)
        self._step_tokens = HistogramCounter(TOKENS)
        self._settled_at = 0.0
        self._due_at = 0.0
        self._was_busy = False

    def count_step(self, step: Step) -> None:
        """A step is launched."""
        self._steps += 1
        chunks = sum(chunk.length for chunk in step.prefills)
        self._step_tokens.add(len(step.decodes) + chunks)

    def first_tokens(self, step: Step, now: float) -> int:
        """Before a step is settled: its tokens that follow none, or none for a while."""
        ending = [step.prefills[i].request for i in step.sampling_prefills]
        for request in ending:
            if request.started:
                self._inter_token.add(now - request.preempted_at)
        return sum(request.max_tokens > 0 for request in ending)

    def count_tokens(self, num_tokens: int, num_first: int, now: float) -> None:
        """A step is settled with `num_tokens`."""
        self._output_tokens += num_tokens
        if num_tokens > num_first:
            self._inter_token.add(now - self._settled_at, num_tokens - num_first)
        self._settled_at = now

    def count_starts(self, replies: Replies) -> None:
        """Some requests have had their first token, or were aborted before it."""
        ended = zip(replies.uids, replies.finishes, strict=True)
        aborted = {uid for uid, finish in ended if finish is Finish.ABORT}
        for start in replies.starts:
            if start.uid not in aborted:
                self._prompt_tokens += start.prompt_tokens
                self._cached_tokens += start.cached_tokens

    def due(self, now: float, busy: bool) -> bool:
        """Whether to send: a period has passed, or the loop has just become idle."""
        idle_now = self._was_busy and not busy
        self._was_busy = busy
        if now < self._due_at and not idle_now:
            return False
        self._due_at = now + PERIOD_S
        return True

    def message(self, scheduler: Scheduler) -> StatsMsg:
        """The figures now."""
        cache = scheduler.cache
        return StatsMsg(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_used=cache.pages.size - cache.num_available,
            num_pages=cache.pages.size,
            page_size=cache.page_size,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            preemptions=scheduler.num_preemptions,
            steps=self._steps,
            inter_token=self._inter_token.message(),
            step_tokens=self._step_tokens.message(),
        )
