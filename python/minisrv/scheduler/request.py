"""One choice of one request inside the scheduler: its status, its tokens, and when it ends.

The status says what a request holds:

    WAITING   Nothing but its place in the queue, by arrival. It waits for its grammar, for a row,
              or for the pages of its prompt.
    RUNNING   A lease: a row of the page table, and pages. Each step computes a chunk of its
              prompt or samples its next token.
    FINISHED  Nothing. Its one final reply has been made; tokens of steps still in flight are
              dropped when they arrive.

                 admitted                ended, aborted or failed
        WAITING ----------> RUNNING ---------------------------------> FINISHED
           |  ^                |                                          ^
           |  +----------------+                                          |
           |      preempted                 aborted or failed             |
           +--------------------------------------------------------------+

A preempted request keeps its output and its place in the order of arrival. When it is admitted
again it prefills its prompt and its output, as far as the cache does not hold them, and continues.
A request that another engine has begun arrives with its output and continues in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from minisrv.engine.forward_batch import Logprobs
from minisrv.errors import ContextLengthError, InvalidRequestError, Lengths, MinisrvError
from minisrv.kvcache.manager import Demand, Lease
from minisrv.sampling_params import SamplingParams
from minisrv.structured_output.matcher import Matcher
from minisrv.wire.arrays import Int32Array
from minisrv.wire.logprobs import TokenLogprobs
from minisrv.wire.messages import Finish, GenerateMsg, ShownPrompt, Start

_CONTINUES = Finish.NONE  # for each token: looking up an enum member takes 0.1 us


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


_MAY_BECOME = {
    Status.WAITING: {Status.RUNNING, Status.FINISHED},
    Status.RUNNING: {Status.WAITING, Status.FINISHED},
    Status.FINISHED: frozenset[Status](),
}


@dataclass(slots=True, eq=False, kw_only=True, repr=False)
class Request:
    """The fields of each group are described above it; times are on the scheduler's clock."""

    # Identity. `uid` is the message's uid plus `choice`, `arrival` the place in the order of all,
    # `key` that of the message if keys have shares, otherwise 0.
    uid: int
    choice: int
    arrival: int
    arrived_at: float
    key: int

    # What to compute. It shares cached pages with requests of the same `salt` only.
    prompt_ids: Int32Array
    produced_ids: Int32Array  # the output of an earlier engine, which the client has
    sampling: SamplingParams
    seed: int
    max_tokens: int
    eos_ids: frozenset[int]
    salt: bytes

    # What its replies are to hold besides tokens.
    parts: int
    shown_prompt: ShownPrompt | None
    show_progress: bool

    # Its place in the scheduler. `bypassed` counts the younger requests admitted before it.
    # While it waits, `demand` remembers how many pages its admission takes, once it was tried.
    status: Status = field(default=Status.WAITING, init=False)
    demand: Demand | None = field(default=None, init=False)
    lease: Lease | None = field(default=None, init=False)
    bypassed: int = field(default=0, init=False)
    admitted_at: float | None = field(default=None, init=False)  # the first time
    preempted_at: float | None = field(default=None, init=False)  # the last time

    # How far it is. `prefill_ids` must be in the cache before the next token can be sampled: the
    # prompt, and after a preemption the output so far. `num_computed` counts the positions that
    # are computed or in a step in flight; `num_in_flight` the sampled tokens not yet settled.
    prefill_ids: Int32Array = field(init=False)
    num_computed: int = field(default=0, init=False)
    num_in_flight: int = field(default=0, init=False)

    # What it has produced. `matcher` follows the output of a request with a grammar. `started`:
    # its `Start` is made. `prompt_logprobs` begin with the second token, as far as computed.
    output_ids: list[int] = field(default_factory=list, init=False)
    matcher: Matcher | None = field(default=None, init=False)
    started: bool = field(default=False, init=False)
    cached_tokens: int = field(default=0, init=False)  # prompt tokens found in the cache
    prompt_logprobs: Logprobs | None = field(default=None, init=False)
    _end_ids: frozenset[int] = field(init=False)

    @classmethod
    def from_message(
        cls,
        message: GenerateMsg,
        uid: int,
        produced_ids: Int32Array,
        arrival: int,
        now: float,
        seed: int,
        max_tokens: int,
        eos_ids: frozenset[int],
        key: int,
    ) -> Request:
        """The choice `uid` of a message."""
        choice = uid - message.uid
        return cls(
            uid=uid,
            choice=choice,
            arrival=arrival,
            arrived_at=now,
            prompt_ids=message.prompt_ids,
            produced_ids=produced_ids,
            sampling=message.sampling,
            seed=seed,
            max_tokens=max_tokens,
            eos_ids=eos_ids,
            salt=message.cache_salt.encode(),
            key=key,
            parts=message.parts,
            shown_prompt=message.shown_prompt,
            show_progress=message.show_progress and not choice and not message.resumed,
        )

    def __post_init__(self) -> None:
        self.output_ids += self.produced_ids.tolist()
        self.prefill_ids = self.all_ids()
        eos = frozenset[int]() if self.sampling.ignore_eos else self.eos_ids
        self._end_ids = eos.union(self.sampling.stop_token_ids)

    def __repr__(self) -> str:
        return (
            f"<Request {self.uid} {self.status.value}, arrival {self.arrival}, "
            f"prompt {len(self.prompt_ids)}, output {len(self.output_ids)}/{self.max_tokens}, "
            f"computed {self.num_computed}, in flight {self.num_in_flight}, "
            f"pages {self.lease.pages if self.lease else []}>"
        )

    def become(self, status: Status) -> None:
        """Change the status. A change that the table above does not allow is a bug."""
        allowed = _MAY_BECOME[self.status]
        assert status in allowed, f"{self!r} cannot become {status.value}"
        self.status = status

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens; not those in flight."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def prefilling(self) -> bool:
        """Whether part of `prefill_ids` is still to be scheduled."""
        return self.num_computed < len(self.prefill_ids)

    @property
    def scores_prompt(self) -> bool:
        """Whether its whole prompt must be computed for its logprobs, even if it is cached."""
        wanted = self.sampling.prompt_logprobs is not None
        return wanted and not self.started and not len(self.produced_ids)

    @property
    def compiling(self) -> bool:
        """Whether its grammar is still being compiled."""
        return self.sampling.grammar is not None and self.matcher is None

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Ids that must not be sampled next: those that would end it before min_tokens."""
        if len(self.output_ids) + self.num_in_flight > self.sampling.min_tokens:
            return ()
        eos = () if self.sampling.ignore_eos else tuple(sorted(self.eos_ids))
        return eos + self.sampling.stop_token_ids

    def all_ids(self) -> Int32Array:
        if not self.output_ids:
            return self.prompt_ids
        return np.concatenate([self.prompt_ids, np.asarray(self.output_ids, np.int32)])

    def follow_grammar(self, matcher: Matcher) -> None:
        """Take a fresh matcher, and bring it to the end of the output."""
        self.matcher = matcher
        for token_id in self.output_ids:
            matcher.advance(token_id)

    def append_token(self, token_id: int) -> Finish:
        """Take a sampled token. Returns how it ends the request: ABORT if its grammar fails.

        A request with max_tokens 0 drops the token and ends.
        """
        if not self.max_tokens:
            return Finish.LENGTH
        output = self.output_ids
        output.append(token_id)
        if self.matcher is not None:
            return self._advance_matcher(self.matcher, token_id)
        if token_id in self._end_ids and len(output) > self.sampling.min_tokens:
            is_eos = token_id in self.eos_ids and not self.sampling.ignore_eos
            return Finish.STOP if is_eos else Finish.STOP_TOKEN
        return Finish.LENGTH if len(output) >= self.max_tokens else _CONTINUES

    def _advance_matcher(self, matcher: Matcher, token_id: int) -> Finish:
        """With a grammar, an EOS token always ends the text: it is allowed only where it may."""
        matcher.advance(token_id)
        if matcher.error is not None:
            return Finish.ABORT
        if token_id in self.eos_ids:
            return Finish.STOP
        if token_id in self._end_ids and len(self.output_ids) > self.sampling.min_tokens:
            return Finish.STOP_TOKEN
        if matcher.ended:
            return Finish.COMPLETE
        return Finish.LENGTH if len(self.output_ids) >= self.max_tokens else _CONTINUES

    def grammar_error(self) -> MinisrvError:
        """The error for an output whose last token ended its grammar's matcher with an error."""
        assert self.matcher is not None
        assert self.matcher.error is not None
        assert self.sampling.grammar is not None
        if self.matcher.misfit:
            return MinisrvError("a token was sampled that the grammar does not allow")
        param = self.sampling.grammar.param
        return InvalidRequestError(self.matcher.error, param=param, code="grammar_too_complex")

    def make_start(self, now: float, *, aborted: bool) -> Start:
        """The message about this request that precedes its first token.

        aborted: leave out the prompt; its logprobs may be incomplete.
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
            queue_s=admitted_at - self.arrived_at,
            prefill_s=now - admitted_at,
            at=now,
            include_stop=self.sampling.include_stop_str_in_output,
            prompt_ids=self.prompt_ids if self.sampling.echo and not aborted else None,
            prompt_logprobs=None if aborted else self._prompt_logprobs(),
            logprobs=self.sampling.logprobs is not None,
            shown_prompt=None if self.choice else self.shown_prompt,
            produced_ids=self.produced_ids if len(self.produced_ids) else None,
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


def output_limit(message: GenerateMsg, max_seq_len: int) -> int:
    """The max_tokens of a request. Raises InvalidRequestError when it exceeds the context."""
    prompt = len(message.prompt_ids)
    asked, room = message.sampling.max_tokens, max_seq_len - prompt
    output = message.sampling.least_output(capped=message.caps_output)
    if prompt and output <= room:
        return room if asked is None else min(asked, room)
    if not prompt:
        raise InvalidRequestError("the prompt has no tokens", param="prompt")
    raise ContextLengthError(Lengths(prompt, output, max_seq_len), "messages")


def outputs_so_far(message: GenerateMsg) -> dict[int, Int32Array]:
    """The choices that a message starts or resumes, by uid: their output so far."""
    if message.resumed:
        return {produced.uid: produced.token_ids for produced in message.resumed}
    uids = range(message.uid, message.uid + message.sampling.n)
    return dict.fromkeys(uids, np.empty(0, np.int32))
