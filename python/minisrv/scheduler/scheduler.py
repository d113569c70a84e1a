"""What each step computes, for which requests, in which pages. Pure: no I/O, clock or torch.

- Decode first. A step takes the next token of every request that decodes, then prefill chunks up to
  a token budget (chunked prefill as in Sarathi-Serve, Agrawal et al., 2024, arXiv:2403.02310).
- The budget goes to the oldest prompt first, which leaves up to a quarter of it to the next one, so
  that a short prompt does not wait for the end of a long one.
- With `fair_keys` each API key has a share of the budget (`fair_shares`), within which its own
  prompts take turns as above.
- A waiting request is admitted when its whole prompt has pages. One that does not fit is bypassed
  by at most MAX_BYPASSES younger ones; then all wait for it.
- Pages are taken on demand. When none is free: evict from the radix tree, or wait for pages that a
  step in flight still uses, or preempt the newest request, which continues later.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import attrgetter

from minisrv.engine.forward_batch import Logprobs
from minisrv.errors import MinisrvError
from minisrv.kvcache.manager import KVCacheManager
from minisrv.scheduler.fair_shares import FairShares, wanted_tokens
from minisrv.scheduler.invariants import check_requests
from minisrv.scheduler.logprobs import take_logprobs
from minisrv.scheduler.replies import Replies
from minisrv.scheduler.request import Request, Status, output_limit, outputs_so_far
from minisrv.scheduler.step_plan import Chunk, StepOutcome, StepPlan
from minisrv.scheduler.waiting_queue import KeyQueue, WaitingQueue, next_prompt_need
from minisrv.structured_output.matcher import Matcher
from minisrv.wire.messages import Failure, Finish, GenerateMsg

MAX_BYPASSES = 64

_FINISHED = Status.FINISHED  # for each token: looking up an enum member takes 0.1 us
_POSITION = attrgetter("num_computed")


class Scheduler:
    """Owner of all requests from `add_request` to their one final reply.

    The caller alternates `schedule` and `settle` in step order, with at most two steps in flight.
    `take_replies` returns what the calls before it have brought about. `new_seed` returns the seed
    of a request that has none. `now` is in seconds on the caller's clock.
    """

    def __init__(
        self,
        cache: KVCacheManager,
        *,
        max_seq_len: int,
        max_prefill_tokens: int,
        eos_ids: Iterable[int],
        new_seed: Callable[[], int],
        fair_keys: bool = False,
    ) -> None:
        self.cache = cache
        self.max_seq_len = max_seq_len
        self.max_prefill_tokens = max_prefill_tokens
        self.running: list[Request] = []
        self.waiting = WaitingQueue()
        self.num_preemptions = 0
        self.num_admitted = 0
        self._eos_ids = frozenset(eos_ids)
        self._new_seed = new_seed
        self._shares = FairShares() if fair_keys else None
        self._requests: dict[int, Request] = {}
        self._replies = Replies()
        self._arrivals = 0
        self._step_id = 0

    @property
    def num_compiling(self) -> int:
        """Requests that wait for their grammar."""
        return sum(request.compiling for request in self.waiting)

    @property
    def num_open(self) -> int:
        """Requests without their final reply."""
        return len(self._requests)

    def add_request(self, message: GenerateMsg, now: float) -> None:
        """Queue each choice of a request, or reply to each with a failure.

        Of a resumed request only the choices that have not ended, with their output.
        """
        outputs = outputs_so_far(message)
        try:
            max_tokens = output_limit(message, self.max_seq_len)
        except MinisrvError as error:
            self._replies.failures += [Failure.from_error(uid, error) for uid in outputs]
            return
        seed = message.sampling.seed
        seed = self._new_seed() if seed is None else seed
        key = message.key if self._shares is not None else 0
        for uid, output in outputs.items():
            self._arrivals += 1
            request = Request.from_message(
                message, uid, output, self._arrivals, now, seed, max_tokens, self._eos_ids, key
            )
            self._requests[request.uid] = request
            self.waiting.enqueue(request)

    def abort_requests(self, uids: Iterable[int], now: float) -> None:
        """End those of the requests that are open; their computed pages stay in the cache."""
        for uid in uids:
            if (request := self._requests.get(uid)) is not None:
                self._finish_request(request, -1, Finish.ABORT, now)

    def drop_requests(self) -> None:
        """End all requests without a reply; their computed pages stay in the cache."""
        for request in list(self._requests.values()):
            self._retire(request)
        self._replies = Replies()

    def set_matcher(self, uid: int, matcher: Matcher) -> None:
        """Let a request that waits for its grammar be admitted, if it is still open."""
        if uid in self._requests:
            self._requests[uid].follow_grammar(matcher)

    def fail_request(self, uid: int, error: MinisrvError) -> None:
        """End a request with a failure, if it is still open."""
        if request := self._requests.get(uid):
            self._retire(request)
            self._replies.failures.append(Failure.from_error(uid, error))

    def schedule(self, now: float) -> StepPlan | None:
        """Plan the next step; None when nothing can be computed now."""
        plan = StepPlan(self._step_id + 1, now)
        prefilling = self._schedule_decodes(plan)
        self._schedule_prefills(plan, prefilling)
        if not plan.decodes and not plan.prefills:
            return None
        self._step_id = plan.step_id
        for index, chunk in enumerate(plan.prefills):
            if not chunk.request.prefilling:
                chunk.request.num_in_flight += 1
                plan.sampling_prefills.append(index)
        plan.scored = [chunk for chunk in plan.prefills if chunk.request.scores_prompt]
        plan.watched = [chunk for chunk in plan.prefills if chunk.request.show_progress]
        plan.page_writes = self.cache.take_page_writes()
        return plan

    def settle(
        self, plan: StepPlan, token_ids: list[int], now: float, logprobs: Logprobs | None = None
    ) -> StepOutcome:
        """Take the tokens of a step that is done; `token_ids` in the order of `plan.samples`."""
        self.cache.settle(plan.step_id)
        self._replies.add_progress(plan.watched, now)
        if logprobs is not None:
            self._replies.logprobs += take_logprobs(plan, token_ids, logprobs)
        prompts, num_decodes = plan.ending_prompts, len(plan.decodes)
        resumed_after_s = [
            now - request.preempted_at
            for request in prompts
            if request.preempted_at is not None and request.started
            if request.status is not _FINISHED
        ]
        num_decoded = self._take_tokens(plan.decodes, token_ids[:num_decodes], now)
        num_others = self._take_tokens(prompts, token_ids[num_decodes:], now)
        return StepOutcome(num_decoded + num_others, num_decoded, resumed_after_s)

    def take_replies(self) -> Replies:
        """Return the replies made since the last call."""
        replies, self._replies = self._replies, Replies()
        return replies

    def check(self) -> None:
        """Assert that requests, leases and pages agree. May be called between any two calls."""
        requests = self._requests.values()
        check_requests(requests, self.running, self.waiting, self.cache, self._step_id + 1)

    def _schedule_decodes(self, plan: StepPlan) -> list[Request]:
        """Schedule the next token of every request that decodes; return those that prefill.

        The position counts as computed from now on, since steps run in order. The only loop over
        all running requests in each step, hence kept lean. In the batch the longest come first:
        the cores of a device take sequences in order, and should not be left with a long one.
        """
        step_id, page_size = plan.step_id, self.cache.page_size
        decodes, prefilling = plan.decodes, list[Request]()
        for request in self.running[:]:
            lease, position = request.lease, request.num_computed
            if lease is None:  # an older one has just preempted it
                continue
            if position < len(request.prefill_ids):
                prefilling.append(request)
                continue
            if len(request.output_ids) + request.num_in_flight >= request.max_tokens:
                continue
            full = position >= len(lease.pages) * page_size
            if full and self._reserve_pages(plan, request, position + 1) <= position:
                continue
            request.num_computed = position + 1
            request.num_in_flight += 1
            lease.last_step = step_id
            decodes.append(request)
        decodes.sort(key=_POSITION, reverse=True)
        return prefilling

    def _schedule_prefills(self, plan: StepPlan, prefilling: list[Request]) -> None:
        """Spend the budget of a step, all of it by arrival or by keys."""
        if self._shares is not None:
            self._schedule_by_keys(plan, prefilling, self._shares)
            return
        queue = self.waiting.of(0)
        candidates = self._prefill_candidates(plan, prefilling, prefilling, queue, [])
        need = partial(next_prompt_need, prefilling, queue)
        self._spend(plan, self.max_prefill_tokens, candidates, need)

    def _schedule_by_keys(
        self, plan: StepPlan, prefilling: list[Request], shares: FairShares
    ) -> None:
        """Spend the budget by keys. What a key leaves of its share is for those after it, and in
        the end for the prompts that the step computes already.
        """
        own: dict[int, list[Request]] = {}
        for request in prefilling:
            own.setdefault(request.key, []).append(request)
        queues = self.waiting.by_key() if self._room(plan, prefilling) > 0 else {}
        wanted = wanted_tokens(own, queues, self.max_prefill_tokens)
        left, bypassed, unserved = 0, list[Request](), list[int]()
        for key, share in shares.divide(wanted, self.max_prefill_tokens).items():
            mine, queue = own.get(key, []), self.waiting.of(key)
            candidates = self._prefill_candidates(plan, mine, prefilling, queue, bypassed)
            need = partial(next_prompt_need, mine, queue)
            num_chunks = len(plan.prefills)
            left = self._spend(plan, left + share, candidates, need)
            if len(plan.prefills) == num_chunks:
                unserved.append(key)
        shares.put_first(unserved)
        for chunk in plan.prefills:
            left -= self._extend_chunk(plan, chunk, left)

    def _spend(
        self,
        plan: StepPlan,
        budget: int,
        candidates: Iterator[Request],
        next_need: Callable[[Request], int],
    ) -> int:
        """Schedule chunks of up to `budget` tokens, oldest first; returns what is left.

        The oldest leaves a quarter of it to the next, which needs `next_need(oldest)`.
        """
        first, at = next(candidates, None), len(plan.prefills)
        if first is None:
            return budget
        reserve = min(budget // 4, next_need(first))
        budget -= self._schedule_chunk(plan, first, budget - reserve)
        while budget > 0 and (request := next(candidates, None)) is not None:
            budget -= self._schedule_chunk(plan, request, budget)
        if budget > 0 and len(plan.prefills) > at and plan.prefills[at].request is first:
            budget -= self._extend_chunk(plan, plan.prefills[at], budget)
        return budget

    def _prefill_candidates(
        self,
        plan: StepPlan,
        own: list[Request],
        prefilling: list[Request],
        queue: KeyQueue,
        bypassed: list[Request],
    ) -> Iterator[Request]:
        """Requests that may prefill now, with their cached pages: of `own`, then of the queue.

        A step that had to preempt admits nobody. prefilling: all running prompts. bypassed: the
        requests that did not fit in this step.
        """
        for request in own:
            if request.lease is not None and self._take_cached_pages(plan, request):
                yield request
        if any(request.bypassed >= MAX_BYPASSES for request in bypassed):
            return
        room = self._room(plan, prefilling)
        for request in queue:
            if room <= 0 or len(bypassed) >= MAX_BYPASSES:
                return
            if request.compiling:
                continue
            if request.num_in_flight == 0 and self._try_admit(plan, request, room):
                for older in bypassed:
                    older.bypassed += 1
                yield request
                prefilling.append(request)
                room = self._room(plan, prefilling)
                continue
            bypassed.append(request)
            if request.bypassed >= MAX_BYPASSES:
                return

    def _room(self, plan: StepPlan, prefilling: list[Request]) -> int:
        """Pages left for a waiting request when all running prompts, those of `prefilling`, are
        complete and each running request has taken one page more; 0 if none may be admitted.
        """
        if plan.has_preempted or not self.cache.rows.num_free:
            return 0
        promised = sum(
            self.cache.pages_for(len(request.prefill_ids)) - len(request.lease.pages)
            for request in prefilling
            if request.lease is not None and request.prefilling
        )
        return self.cache.num_available - promised - len(self.running)

    def _try_admit(self, plan: StepPlan, request: Request, room: int) -> bool:
        """Give a waiting request a row and its cached pages, if its whole prompt fits in `room`."""
        demand = request.demand
        if demand is None:
            uses_cache = not request.scores_prompt
            demand = self.cache.open_demand(request.all_ids(), request.salt, uses_cache=uses_cache)
            request.demand = demand
        self.cache.update_demand(demand, plan.step_id)
        if demand.pinned.pending or demand.num_pages > room:
            return False
        self.waiting.withdraw(request)
        request.become(Status.RUNNING)
        request.lease = self.cache.open_lease(request.salt, request.uid)
        request.prefill_ids, request.num_computed = demand.token_ids, 0
        request.demand, request.bypassed = None, 0
        if request.admitted_at is None:
            request.admitted_at = plan.scheduled_at
            self.num_admitted += 1
        insort(self.running, request, key=lambda r: r.arrival)
        return self._take_cached_pages(plan, request)

    def _take_cached_pages(self, plan: StepPlan, request: Request) -> bool:
        """Take what the cache holds; False when this very step computes the request's next page."""
        assert request.lease is not None
        if request.scores_prompt:
            return True
        before = request.num_computed
        computed = self.cache.extend_match(request.lease, request.prefill_ids, before, plan.step_id)
        if computed is None:
            return False
        request.num_computed = computed
        if request.preempted_at is None:
            request.cached_tokens += computed - before
        return True

    def _schedule_chunk(self, plan: StepPlan, request: Request, budget: int) -> int:
        """Add a chunk of up to `budget` tokens of a prompt; returns its length."""
        start = request.num_computed
        end = min(len(request.prefill_ids), start + budget)
        if end <= start:
            return 0
        length = self._reserve_pages(plan, request, end) - start
        if length <= 0:
            return 0
        chunk = Chunk(request, start, 0)
        plan.prefills.append(chunk)
        self._grow_chunk(plan, chunk, length)
        return length

    def _extend_chunk(self, plan: StepPlan, chunk: Chunk, budget: int) -> int:
        """Give a chunk what the others left of the budget; returns how many tokens it takes."""
        request, end = chunk.request, chunk.start + chunk.length
        assert request.lease is not None
        fits = self.cache.grow(request.lease, min(len(request.prefill_ids), end + budget))
        length = max(0, fits - end)
        self._grow_chunk(plan, chunk, length)
        return length

    def _grow_chunk(self, plan: StepPlan, chunk: Chunk, length: int) -> None:
        request = chunk.request
        assert request.lease is not None
        chunk.length += length
        request.num_computed += length
        request.lease.last_step = plan.step_id
        self.cache.share(request.lease, request.prefill_ids, request.num_computed, plan.step_id)

    def _reserve_pages(self, plan: StepPlan, request: Request, num_tokens: int) -> int:
        """Take pages for up to `num_tokens`; returns how many tokens fit.

        Preempts newer requests, newest first, but none that this step computes already.
        """
        assert request.lease is not None
        while True:
            fits = self.cache.grow(request.lease, num_tokens)
            if fits > request.num_computed or self.cache.num_returning:
                return fits
            victim = self.running[-1]
            assert victim.lease is not None
            if victim.arrival <= request.arrival or victim.lease.last_step == plan.step_id:
                return fits
            self._preempt(victim, plan.scheduled_at)
            plan.has_preempted = True

    def _preempt(self, request: Request, now: float) -> None:
        """Take back a request's lease; it keeps its output and its place by arrival."""
        self._close_lease(request)
        request.become(Status.WAITING)
        self.waiting.enqueue(request)
        request.preempted_at = now
        self.num_preemptions += 1

    def _take_tokens(self, requests: list[Request], token_ids: list[int], now: float) -> int:
        """Append to each request its token, and reply; returns how many tokens count.

        Runs for every token, hence without a call for a reply that only goes on.
        """
        replies, num_dropped = self._replies, 0
        uids, ids, finishes = replies.uids, replies.token_ids, replies.finishes
        for request, token_id in zip(requests, token_ids, strict=True):
            request.num_in_flight -= 1
            if request.status is _FINISHED:
                num_dropped += 1
                continue
            finish = request.append_token(token_id)
            if finish:
                num_dropped += not self._finish_at_token(request, token_id, finish, now)
            elif request.started:
                uids.append(request.uid)
                ids.append(token_id)
                finishes.append(finish)
            else:
                replies.add_token(request, token_id, finish, now)
        return len(token_ids) - num_dropped

    def _finish_at_token(self, request: Request, token_id: int, finish: Finish, now: float) -> bool:
        """End a request with its last token; returns whether the token counts."""
        if finish is not Finish.ABORT:
            wanted = request.max_tokens > 0
            self._finish_request(request, token_id if wanted else -1, finish, now)
            return wanted
        self.fail_request(request.uid, request.grammar_error())
        return False

    def _finish_request(self, request: Request, token_id: int, finish: Finish, now: float) -> None:
        self._retire(request)
        self._replies.add_token(request, token_id, finish, now)

    def _retire(self, request: Request) -> None:
        if request.status is Status.WAITING:
            self.waiting.withdraw(request)
        else:
            self._close_lease(request)
        request.become(Status.FINISHED)
        del self._requests[request.uid]

    def _close_lease(self, request: Request) -> None:
        assert request.lease is not None
        known = min(request.num_computed, request.num_tokens)
        self.cache.close_lease(request.lease, request.all_ids(), known)
        request.lease = None
        self.running.remove(request)
