"""The loop's counters for the frontend's metrics, updated per step, never per token."""

from __future__ import annotations

from minisrv.scheduler.replies import Replies
from minisrv.scheduler.scheduler import Scheduler
from minisrv.scheduler.step_plan import StepOutcome, StepPlan
from minisrv.wire.histogram import SECONDS, TOKENS, HistogramCounter
from minisrv.wire.messages import StatsMsg

PERIOD_S = 0.5
HALF_LIFE_S = 10.0


class Rate:
    """Tokens per second of recent work: work that is HALF_LIFE_S old counts half."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """`tokens` took `seconds`."""
        kept = 0.5 ** (seconds / HALF_LIFE_S)
        self._tokens = kept * self._tokens + tokens
        self._seconds = kept * self._seconds + seconds

    @property
    def value(self) -> float:
        """0 before any work."""
        return self._tokens / self._seconds if self._seconds else 0.0


class LoopStats:
    """Counts since the start, and when to send them.

    The inter-token latency of a decode is the time since the step before was settled: every
    request that decodes is in every step. One that had to wait for a page counts as one step.
    """

    def __init__(self, admitted_before: int = 0) -> None:
        """admitted_before: requests of the warm-up, which do not count."""
        self._admitted_before = admitted_before
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._prefilled_tokens = 0
        self._output_tokens = 0
        self._steps = 0
        self._inter_token = HistogramCounter(SECONDS)
        self._step_tokens = HistogramCounter(TOKENS)
        self._prefill_rate, self._decode_rate = Rate(), Rate()
        self._settled_at = 0.0
        self._due_at = 0.0
        self._was_busy = False

    def count_launch(self, plan: StepPlan) -> None:
        """Count a step that is launched, and its tokens."""
        self._steps += 1
        num_tokens = plan.num_tokens
        self._prefilled_tokens += num_tokens - len(plan.decodes)
        self._step_tokens.count_value(num_tokens)

    def count_tokens(self, plan: StepPlan, outcome: StepOutcome, now: float) -> None:
        """Count the tokens of a step that is settled; a request's first has no latency."""
        seconds = now - max(self._settled_at, plan.scheduled_at)
        if num_prefilled := plan.num_tokens - len(plan.decodes):
            self._prefill_rate.add(num_prefilled, seconds)
        if plan.decodes:
            self._decode_rate.add(outcome.num_decoded, seconds)
        self._output_tokens += outcome.num_tokens
        for waited_s in outcome.resumed_after_s:
            self._inter_token.count_value(waited_s)
        if outcome.num_decoded:
            self._inter_token.count_value(now - self._settled_at, outcome.num_decoded)
        self._settled_at = now

    def count_prompts(self, replies: Replies) -> None:
        """Count the prompts of requests that got their first token, not of those aborted before."""
        self._prompt_tokens += replies.prompt_tokens
        self._cached_tokens += replies.cached_tokens

    def due(self, now: float, busy: bool) -> bool:
        """Whether to send now: a period has passed, or the loop has just become idle."""
        idle_now = self._was_busy and not busy
        self._was_busy = busy
        if now < self._due_at and not idle_now:
            return False
        self._due_at = now + PERIOD_S
        return True

    def make_message(self, scheduler: Scheduler) -> StatsMsg:
        cache = scheduler.cache
        prompts = [(len(one.prefill_ids), one.num_computed) for one in scheduler.running]
        prompts += [(len(one.prefill_ids), 0) for one in scheduler.waiting]
        return StatsMsg(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_used=cache.pages.size - cache.num_available,
            num_pages=cache.pages.size,
            page_size=cache.page_size,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            prefilled_tokens=self._prefilled_tokens,
            output_tokens=self._output_tokens,
            preemptions=scheduler.num_preemptions,
            steps=self._steps,
            admitted=scheduler.num_admitted - self._admitted_before,
            queued_tokens=sum(max(0, length - computed) for length, computed in prompts),
            prefill_rate=self._prefill_rate.value,
            decode_rate=self._decode_rate.value,
            inter_token=self._inter_token.message(),
            step_tokens=self._step_tokens.message(),
        )
