"""One choice of one request inside the scheduler, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from minisrv.engine.forward_batch import Logprobs
from minisrv.kvcache.manager import Lease
from minisrv.sampling_params import SamplingParams
from minisrv.structured_output.matcher import Matcher
from minisrv.wire.arrays import Int32Array
from minisrv.wire.logprobs import TokenLogprobs
from minisrv.wire.messages import Finish, ShownPrompt, Start


class Status(Enum):
    """WAITING has no row; RUNNING has one; FINISHED is final."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """A request's tokens, how far they are computed, and what is still to come.

    `arrival` orders requests for ever, also after a preemption. `prefill_ids` are the tokens that
    must be in the cache before the next one can be sampled: the prompt, and after a preemption
    the output so far. `computed` counts the positions computed or in a launched step; `pending`
    the sampled tokens that have not come back; `last_step` is the last step that it was in.
    `matcher` follows the output; a request with a grammar waits until it has one.
    `prompt_logprobs` are those of its second token first, as far as they are computed.
    `arrived_at`, `admitted_at` (the first time) and `preempted_at` are on the scheduler's clock.
    """

    uid: int
    arrival: int
    choice: int
    seed: int
    prompt_ids: Int32Array
    sampling: SamplingParams
    max_tokens: int
    eos_ids: frozenset[int]
    parts: int = 0
    shown_prompt: ShownPrompt | None = None
    show_progress: bool = False
    salt: bytes = b""
    prefill_ids: Int32Array = field(init=False)
    output_ids: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    lease: Lease | None = None
    computed: int = 0
    pending: int = 0
    cached_tokens: int = 0
    started: bool = False
    preempted: bool = False
    bypassed: int = 0
    last_step: int = 0
    matcher: Matcher | None = None
    prompt_logprobs: Logprobs | None = None
    arrived_at: float = 0.0
    admitted_at: float | None = None
    preempted_at: float = 0.0
    _ends: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.prefill_ids = self.prompt_ids
        eos = frozenset[int]() if self.sampling.ignore_eos else self.eos_ids
        self._ends = eos.union(self.sampling.stop_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def prefilling(self) -> bool:
        """Whether tokens are missing in the cache before the next can be sampled."""
        return self.computed < len(self.prefill_ids)

    @property
    def scores_prompt(self) -> bool:
        """Whether all of its prompt must be computed, cached or not, for its log-probabilities."""
        return self.sampling.prompt_logprobs is not None and not self.started

    @property
    def compiling(self) -> bool:
        """Whether it waits for its grammar."""
        return self.sampling.grammar is not None and self.matcher is None

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Ids that may not be sampled next, since the output is shorter than min_tokens."""
        if len(self.output_ids) + self.pending > self.sampling.min_tokens:
            return ()
        eos = () if self.sampling.ignore_eos else tuple(sorted(self.eos_ids))
        return eos + self.sampling.stop_token_ids

    def all_ids(self) -> Int32Array:
        """Prompt and output in one array."""
        return np.concatenate([self.prompt_ids, np.asarray(self.output_ids, np.int32)])

    def append(self, token_id: int) -> Finish:
        """Take a sampled token; says whether it ends the request, ABORT if its grammar fails.

        A request that wants no token takes none, and ends.
        """
        if not self.max_tokens:
            return Finish.LENGTH
        output = self.output_ids
        output.append(token_id)
        if self.matcher is not None:
            return self._follow(self.matcher, token_id)
        if token_id in self._ends and len(output) > self.sampling.min_tokens:
            is_eos = token_id in self.eos_ids and not self.sampling.ignore_eos
            return Finish.STOP if is_eos else Finish.STOP_TOKEN
        return Finish.LENGTH if len(output) >= self.max_tokens else Finish.NONE

    def _follow(self, matcher: Matcher, token_id: int) -> Finish:
        """As `append`, for a text with a grammar: the grammar says when end-of-text may come."""
        matcher.advance(token_id)
        if matcher.error is not None:
            return Finish.ABORT
        if token_id in self.eos_ids:
            return Finish.STOP
        if token_id in self._ends and len(self.output_ids) > self.sampling.min_tokens:
            return Finish.STOP_TOKEN
        if matcher.ended:
            return Finish.COMPLETE
        return Finish.LENGTH if len(self.output_ids) >= self.max_tokens else Finish.NONE

    def start(self, now: float, *, aborted: bool) -> Start:
        """What the detokenizer and the frontend need to know of this request.

        aborted: nobody reads its prompt, whose log-probabilities may be computed in part.
        """
        self.started = True
        admitted_at = now if self.admitted_at is None else self.admitted_at
        return Start(
            uid=self.uid,
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=self.cached_tokens,
            min_tokens=self.sampling.min_tokens,
            stop=self.sampling.stop,
            skip_special_tokens=self.sampling.skip_special_tokens,
            parts=self.parts,
            return_token_ids=self.sampling.return_token_ids,
            queue_s=admitted_at - self.arrived_at,
            prefill_s=now - admitted_at,
            at=now,
            include_stop=self.sampling.include_stop_str_in_output,
            prompt_ids=self.prompt_ids if self.sampling.echo and not aborted else None,
            prompt_logprobs=None if aborted else self._prompt_logprobs(),
            logprobs=self.sampling.logprobs is not None,
            shown_prompt=None if self.choice else self.shown_prompt,
        )

    def _prompt_logprobs(self) -> TokenLogprobs | None:
        kept = self.prompt_logprobs
        if kept is None:
            return None
        return TokenLogprobs(
            uid=self.uid,
            token_ids=self.prompt_ids[1:],
            logprobs=kept.logprobs,
            top_ids=kept.top_ids.reshape(-1),
            top_logprobs=kept.top_logprobs.reshape(-1),
        )
