"""What each step computes, for whom, with which pages: pure policy, without I/O, clock or torch.

One step takes the next token of every request that decodes, then prompt chunks under a token
budget (chunked prefill as in Sarathi-Serve, Agrawal et al., 2024, arXiv:2403.02310). Pages are
taken when they are needed. When none is left: evict from the radix tree, wait for pages that a
step in flight still uses, or preempt the newest request, which continues later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from minisrv.engine.forward_batch import Logprobs
from minisrv.errors import ContextLengthError, InvalidRequestError, Lengths, MinisrvError
from minisrv.kvcache.manager import KVCacheManager
from minisrv.scheduler.logprobs import take_logprobs
from minisrv.scheduler.replies import Replies
from minisrv.scheduler.request import Request, Status
from minisrv.scheduler.step import Chunk, Step
from minisrv.scheduler.waiting_queue import WaitingQueue
from minisrv.structured_output.matcher import Matcher
from minisrv.wire.messages import Failure, Finish, GenerateMsg

MAX_BYPASSES = 64


class Scheduler:
    """Owner of all requests between `add` and their one final reply.

    The caller alternates `schedule` and `settle` in step order, with at most two steps between;
    `take_replies` gives what has come of add, abort and settle. `new_seed` gives the seed of a
    request that names none. `now` is the time on the caller's clock, in seconds; the caller sets
    it.
    """

    def __init__(
        self,
        cache: KVCacheManager,
        *,
        max_seq_len: int,
        max_prefill_tokens: int,
        eos_ids: Iterable[int],
        new_seed: Callable[[], int],
    ) -> None:
        self.cache = cache
        self.max_seq_len = max_seq_len
        self.max_prefill_tokens = max_prefill_tokens
        self.running: list[Request] = []
        self.waiting = WaitingQueue()
        self.num_preemptions = 0
        self.now = 0.0
        self._eos_ids = frozenset(eos_ids)
        self._new_seed = new_seed
        self._requests: dict[int, Request] = {}
        self._replies = Replies()
        self._arrivals = 0
        self._step_id = 0
        self._preempted = False

    @property
    def num_compiling(self) -> int:
        """Requests that wait for their grammar."""
        return sum(request.compiling for request in self.waiting)

    @property
    def num_open(self) -> int:
        """Requests without their final reply."""
        return len(self._requests)

    def add(self, message: GenerateMsg) -> None:
        """Queue the choices of a request, or refuse it with a failure for each."""
        try:
            max_tokens = self._output_limit(message)
        except MinisrvError as error:
            for choice in range(message.sampling.n):
                self._replies.failures.append(Failure.from_error(message.uid + choice, error))
            return
        seed = message.sampling.seed
        seed = self._new_seed() if seed is None else seed
        for choice in range(message.sampling.n):
            self._arrivals += 1
            request = Request(
                uid=message.uid + choice,
                arrival=self._arrivals,
                choice=choice,
                seed=seed,
                prompt_ids=message.prompt_ids,
                sampling=message.sampling,
                max_tokens=max_tokens,
                eos_ids=self._eos_ids,
                parts=message.parts,
                shown_prompt=message.shown_prompt,
                show_progress=message.show_progress and not choice,
                salt=message.cache_salt.encode(),
                arrived_at=self.now,
            )
            self._requests[request.uid] = request
            self.waiting.add(request)

    def abort(self, uids: Iterable[int]) -> None:
        """End requests in any state; their computed pages stay in the cache."""
        for uid in uids:
            request = self._requests.get(uid)
            if request is not None:
                self._finish(request, -1, Finish.ABORT)

    def set_matcher(self, uid: int, matcher: Matcher) -> None:
        """Let a request go on whose grammar is compiled, if it is still there."""
        if uid in self._requests:
            self._requests[uid].matcher = matcher

    def fail(self, uid: int, error: MinisrvError) -> None:
        """End a request, if it is still there, with a failure."""
        if request := self._requests.get(uid):
            self._remove(request)
            self._replies.failures.append(Failure.from_error(uid, error))

    def schedule(self) -> Step | None:
        """The next step, or None when nothing can be computed now."""
        step = Step(self._step_id + 1)
        self._preempted = False
        prefilling = self._schedule_decodes(step)
        self._schedule_prefills(step, prefilling)
        if not step.decodes and not step.prefills:
            return None
        self._step_id = step.step_id
        for index, chunk in enumerate(step.prefills):
            if not chunk.request.prefilling:
                chunk.request.pending += 1
                step.sampling_prefills.append(index)
        step.scored = [chunk for chunk in step.prefills if chunk.request.scores_prompt]
        step.watched = [chunk for chunk in step.prefills if chunk.request.show_progress]
        step.page_writes = self.cache.take_page_writes()
        return step

    def settle(self, step: Step, token_ids: list[int], logprobs: Logprobs | None = None) -> int:
        """Take the tokens of a step that is done; `token_ids` in the order of `step.samples`.

        Returns how many of them count: those of requests that had not ended.
        """
        self.cache.settle(step.step_id)
        replies, finished = self._replies, Status.FINISHED
        replies.add_progress(step.watched, self.now)
        if logprobs is not None:
            replies.logprobs += take_logprobs(step, token_ids, logprobs)
        told = len(replies.uids)
        add_uid, add_token = replies.uids.append, replies.token_ids.append
        add_finish = replies.finishes.append
        for request, token_id in zip(step.samples, token_ids, strict=True):
            request.pending -= 1
            if request.status is finished:
                continue
            finish = request.append(token_id)
            if finish:
                self._end(request, token_id, finish)
            elif not request.started:
                replies.add(request, token_id, finish, self.now)
            else:
                add_uid(request.uid)
                add_token(token_id)
                add_finish(finish)
        return len(replies.uids) - told - replies.token_ids[told:].count(-1)

    def take_replies(self) -> Replies:
        """What has come since the last call."""
        replies, self._replies = self._replies, Replies()
        return replies

    def check(self) -> None:
        """Assert that requests, leases and pages agree; for tests, after each step."""
        running = {id(request) for request in self.running}
        waiting = {id(request) for request in self.waiting}
        assert running.isdisjoint(waiting)
        assert running | waiting == {id(request) for request in self._requests.values()}
        leases = []
        for request in self.running:
            assert request.status is Status.RUNNING
            assert request.lease is not None
            assert len(request.lease.pages) >= self.cache.pages_for(request.computed)
            leases.append(request.lease)
        for request in self.waiting:
            assert request.status is Status.WAITING
            assert request.lease is None
        assert [r.arrival for r in self.running] == sorted(r.arrival for r in self.running)
        self.cache.check(leases)

    def _output_limit(self, message: GenerateMsg) -> int:
        """max_tokens of a request. Raises InvalidRequestError when it is over the context."""
        prompt = len(message.prompt_ids)
        asked = message.sampling.max_tokens
        output = 1 if asked is None else asked
        if prompt and prompt + output <= self.max_seq_len:
            return self.max_seq_len - prompt if asked is None else asked
        if not prompt:
            raise InvalidRequestError("the prompt has no tokens", param="prompt")
        raise ContextLengthError(Lengths(prompt, output, self.max_seq_len), "messages")

    def _schedule_decodes(self, step: Step) -> list[Request]:
        """Take the next token of all that decode; it counts as computed, for steps run in order.

        Returns the requests that prefill. The one loop over everybody: it is kept lean.
        """
        step_id, page_size = step.step_id, self.cache.page_size
        decodes, prefilling = step.decodes, list[Request]()
        for request in self.running[:]:
            lease, position = request.lease, request.computed
            if lease is None:  # preempted for one before it
                continue
            if position < len(request.prefill_ids):
                prefilling.append(request)
                continue
            if len(request.output_ids) + request.pending >= request.max_tokens:
                continue
            full = position >= len(lease.pages) * page_size
            if full and self._reserve(request, position + 1, step_id) <= position:
                continue
            request.computed = position + 1
            request.pending += 1
            request.last_step = lease.last_step = step_id
            decodes.append(request)
        return prefilling

    def _schedule_prefills(self, step: Step, prefilling: list[Request]) -> None:
        """Fill the budget, oldest first; the oldest leaves a quarter of it to the next."""
        budget = self.max_prefill_tokens
        candidates = self._prefill_candidates(step.step_id, prefilling)
        first = next(candidates, None)
        if first is None:
            return
        reserve = min(budget // 4, self._others_need(first))
        budget -= self._schedule_chunk(step, first, budget - reserve)
        while budget > 0 and (request := next(candidates, None)) is not None:
            budget -= self._schedule_chunk(step, request, budget)
        if budget > 0 and step.prefills and step.prefills[0].request is first:
            self._extend_chunk(step, step.prefills[0], budget)

    def _prefill_candidates(self, step_id: int, prefilling: list[Request]) -> Iterator[Request]:
        """Requests that may prefill now, each with a lease and what the cache has for it.

        Nobody is admitted in a step that had to preempt. A waiter that has no room is passed by at
        most MAX_BYPASSES younger ones.
        """
        for request in prefilling:
            if request.status is Status.RUNNING and self._match(request, step_id):
                yield request
        passed: list[Request] = []
        for request in self.waiting:
            full = not self.cache.rows.num_free or len(passed) >= MAX_BYPASSES
            if full or self._preempted:
                return
            if request.compiling:
                continue
            if request.pending == 0 and self._admit(request, step_id):
                for older in passed:
                    older.bypassed += 1
                yield request
                continue
            passed.append(request)
            if request.bypassed >= MAX_BYPASSES:
                return

    def _others_need(self, first: Request) -> int:
        """Tokens that requests after `first` want to prefill, as far as it matters."""
        for request in self.running:
            if request is not first and request.prefilling:
                return len(request.prefill_ids) - request.computed
        head = next(iter(self.waiting), None)
        return 0 if head is None else len(head.prefill_ids)

    def _admit(self, request: Request, step_id: int) -> bool:
        """Give a waiting request a row and its cached pages, if its prompt has room."""
        ids = request.all_ids() if request.output_ids else request.prompt_ids
        cached, evictable, pending = 0, 0, False
        if not request.scores_prompt:
            cached, evictable, pending = self.cache.peek(ids, step_id, request.salt)
        promised = sum(
            self.cache.pages_for(len(r.prefill_ids)) - len(r.lease.pages)
            for r in self.running
            if r.lease is not None and r.prefilling
        )
        need = self.cache.pages_for(len(ids)) - cached + promised + len(self.running)
        if pending or need > self.cache.num_available - evictable:
            return False
        self.waiting.remove(request)
        request.prefill_ids, request.computed = ids, 0
        request.lease = self.cache.open_lease(request.salt)
        request.status = Status.RUNNING
        request.bypassed = 0
        if request.admitted_at is None:
            request.admitted_at = self.now
        at = next((i for i, r in enumerate(self.running) if r.arrival > request.arrival), None)
        self.running.insert(len(self.running) if at is None else at, request)
        return self._match(request, step_id)

    def _match(self, request: Request, step_id: int) -> bool:
        """Take what the cache has; False when the rest is being computed in this very step."""
        assert request.lease is not None
        if request.scores_prompt:
            return True
        before = request.computed
        computed = self.cache.extend_match(
            request.lease, request.prefill_ids, request.computed, step_id
        )
        if computed is None:
            return False
        request.computed = computed
        if not request.preempted:
            request.cached_tokens += computed - before
        return True

    def _schedule_chunk(self, step: Step, request: Request, budget: int) -> int:
        """Add up to `budget` prompt tokens of a request; returns how many."""
        start = request.computed
        end = min(len(request.prefill_ids), start + budget)
        if end <= start:
            return 0
        length = self._reserve(request, end, step.step_id) - start
        if length <= 0:
            return 0
        chunk = Chunk(request, start, 0)
        step.prefills.append(chunk)
        self._lengthen(step, chunk, length)
        return length

    def _extend_chunk(self, step: Step, chunk: Chunk, budget: int) -> None:
        """Give the first chunk what the others left of the budget."""
        end = chunk.start + chunk.length
        request = chunk.request
        assert request.lease is not None
        fits = self.cache.grow(request.lease, min(len(request.prefill_ids), end + budget))
        self._lengthen(step, chunk, max(0, fits - end))

    def _lengthen(self, step: Step, chunk: Chunk, length: int) -> None:
        request = chunk.request
        assert request.lease is not None
        chunk.length += length
        request.computed += length
        request.last_step = request.lease.last_step = step.step_id
        self.cache.share(request.lease, request.prefill_ids, request.computed, step.step_id)

    def _reserve(self, request: Request, num_tokens: int, step_id: int) -> int:
        """Pages for up to `num_tokens`; returns how many fit.

        Preempts newer requests, but none that is in this step already.
        """
        assert request.lease is not None
        while True:
            fits = self.cache.grow(request.lease, num_tokens)
            if fits > request.computed or self.cache.num_returning:
                return fits
            victim = self.running[-1]
            if victim.arrival <= request.arrival or victim.last_step == step_id:
                return fits
            self._preempt(victim)

    def _preempt(self, request: Request) -> None:
        """Take a running request's pages; it waits at its old place with the same text."""
        self._release(request)
        request.status = Status.WAITING
        self.waiting.add(request)
        request.preempted = self._preempted = True
        request.preempted_at = self.now
        self.num_preemptions += 1

    def _end(self, request: Request, token_id: int, finish: Finish) -> None:
        if finish is not Finish.ABORT:
            self._finish(request, token_id if request.max_tokens else -1, finish)
            return
        assert request.matcher is not None
        assert request.matcher.error is not None
        assert request.sampling.grammar is not None
        param = request.sampling.grammar.param
        error = InvalidRequestError(request.matcher.error, param=param, code="grammar_too_complex")
        self.fail(request.uid, error)

    def _finish(self, request: Request, token_id: int, finish: Finish) -> None:
        self._remove(request)
        self._replies.add(request, token_id, finish, self.now)

    def _remove(self, request: Request) -> None:
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        else:
            self._release(request)
        request.status = Status.FINISHED
        del self._requests[request.uid]

    def _release(self, request: Request) -> None:
        assert request.lease is not None
        known = min(request.computed, request.num_tokens)
        self.cache.close_lease(request.lease, request.all_ids(), known)
        request.lease = None
        self.running.remove(request)
