"""Requests and the server's state. Every request that is accepted gets a final event.

A request holds consecutive uids, one per choice; a query holds one. A uid is open from `open` until
its final (a finish code, a failure or an answer) arrives, even if its client has left: so the limit
on open requests limits the work of the other processes.

When one of those processes has died, requests and queries are kept. Once all serve again, those
that are open are sent again, each with the output that has arrived, from which it goes on.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from typing import Any

from minisrv.config import ServerConfig
from minisrv.errors import MinisrvError, NotReadyError, OverloadedError, RequestFailedError
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.frontend.registry.open_request import OpenRequest, RequestAborted
from minisrv.frontend.registry.queries import Queries
from minisrv.frontend.registry.queue_gauge import QueueGauge
from minisrv.frontend.registry.resuming import causes, send_again
from minisrv.frontend.registry.states import Dead, Draining, Restarting, Serving, Starting, State
from minisrv.frontend.registry.status_line import StatusLine
from minisrv.wire.events import Event, failure_error, gather_reply
from minisrv.wire.failures import failure_reply
from minisrv.wire.messages import (
    AbortMsg,
    AnswerMsg,
    Failure,
    PromptsMsg,
    Query,
    StatsMsg,
    TokenizeMsg,
    UserReply,
)

STOPPING = "the server is stopping"
SEED_BITS = 63
MAX_RECENT = 4096
Send = Callable[[int, TokenizeMsg | AbortMsg | Query], None]


class RequestRegistry:
    """Routes replies to the requests they belong to. All methods belong to one event loop.

    refused: requests and queries that a limit refused, by its name. num_dropped: requests aborted
    because their output was not read. restarts: of the other processes, by kind. num_resumed:
    requests sent again after one. given_up: choices that ended because of one, by reason.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.state: State = Starting("start", 0.0)
        self.phases: dict[str, float] = {}
        self.stats: StatsMsg | None = None
        self.refused: Counter[str] = Counter()
        self.num_dropped = 0
        self.restarts: dict[str, int] = {}
        self.num_resumed = 0
        self.given_up: Counter[str] = Counter()
        self._resumes = config.resume
        self._on_hold = False
        self._resuming: asyncio.Task[None] | None = None
        self._queries = Queries()
        self._queue = QueueGauge(config.max_running_requests)
        self._max_waiting = config.max_waiting_requests
        self._max_queue_wait = config.max_queue_wait
        self._status_line = StatusLine()
        self._max_open = config.max_open_requests
        self._tokenizers = cycle(range(config.num_tokenizers))
        self._next_uid = 1
        self._send: Send | None = None
        self._requests: dict[int, OpenRequest] = {}
        self._owners: dict[int, OpenRequest] = {}
        self._left: dict[int, OpenRequest] = {}  # suspects whose clients left, until `resume`
        self._unstarted: set[int] = set()
        self._recent_uids: dict[str, range] = {}  # by request id, of requests that have ended too

    def connect(self, send: Send) -> None:
        """Send messages by `send(tokenizer_index, message)` from now on."""
        self._send = send

    def set_progress(self, phase: str, fraction: float) -> None:
        """Record the progress of the start."""
        if isinstance(self.state, Starting):
            self.state = Starting(phase, fraction)
            self.phases.setdefault(phase, time.monotonic())

    def set_ready(self, model: ModelInfo) -> None:
        """Accept requests from now on."""
        assert self._send is not None, "connect comes before set_ready"
        if isinstance(self.state, Starting):
            self.state = Serving(model)
            self.phases["ready"] = time.monotonic()

    def hold(self, sentence: str) -> None:
        """Send nothing until `resume`, because a process has died; `sentence` says which.

        With --no-resume all that is open fails.
        """
        if isinstance(self.state, Starting | Dead):
            return
        self.set_stalled(sentence)
        self._on_hold = True
        if self._resuming is not None:
            self._resuming.cancel()
        self._queries.hold()
        for uid, request in list(self._owners.items()):
            request.tokenizers.clear()
            if request.aborted:
                self._release(request, uid)
        if not self._resumes:
            error = NotReadyError(f"{sentence}; try again later", code="engine_restarted")
            self._queries.fail_all(error)
            self._give_up(list(self._owners), error, "no_resume")

    def set_stalled(self, sentence: str) -> None:
        """A process makes no progress; requests are accepted, and /ready says no."""
        if isinstance(self.state, Serving | Restarting):
            self.state = Restarting(self.state.model, sentence)

    def resume(self, model: ModelInfo, suspects: Collection[int] = ()) -> None:
        """All processes serve again: after `hold`, send what is open, in the background.

        suspects: uids that a process worked on when it died. What may have been the cause is given
        up: a request at the second time (`causes`), a query at the first.
        """
        if isinstance(self.state, Restarting):
            self.state = Serving(model)
        if not self._on_hold or isinstance(self.state, Dead):
            return
        self._on_hold = False
        self._queue.forget_stats()
        error = RequestFailedError(
            "a process of the server has died while it worked on this request, "
            "so it is not tried again",
            code="request_ended_engine",
        )
        self._queries.fail(suspects, error)
        known, self._left = self._owners | self._left, {}
        owners = {uid: known[uid] for uid in suspects if uid in known}
        self._give_up(causes(owners), error, "suspect")
        self._queries.resume()
        messages = {one: one.messages[:] for one in dict.fromkeys(self._owners.values())}
        self.num_resumed += sum(map(bool, messages.values()))
        self._resuming = asyncio.create_task(send_again(messages, self._dispatch), name="resume")

    def _give_up(self, uids: Sequence[int], error: MinisrvError, reason: str) -> None:
        if uids:
            self.given_up[reason] += len(uids)
            self.deliver(failure_reply([Failure.from_error(uid, error) for uid in uids]))

    def start_drain(self) -> None:
        """Refuse further requests and queries; those that are open go on."""
        if isinstance(self.state, Serving | Restarting):
            self.state = Draining(self.state.model)

    @property
    def is_idle(self) -> bool:
        """Whether every request has been read to its end, and every query answered."""
        return not self._requests and not self._queries

    @property
    def model(self) -> ModelInfo:
        """The served model. Raises NotReadyError while starting, RequestFailedError when dead."""
        match self.state:
            case Serving(model) | Restarting(model) | Draining(model):
                return model
            case Starting(phase, fraction):
                raise NotReadyError(f"the server is starting: {phase}, {fraction:.0%}")
            case Dead(error):
                raise failure_error(Failure.from_error(0, error))

    @property
    def num_open(self) -> int:
        """Uids without a final event, and queries without an answer."""
        return len(self._owners) + len(self._queries)

    @property
    def _num_waiting(self) -> int:
        """About how many uids wait behind running ones."""
        return self._queue.waiting(len(self._owners), len(self._unstarted))

    def open(
        self, n: int = 1, request_id: str = "", drop_reader: Callable[[], None] | None = None
    ) -> int:
        """Reserve `n` consecutive uids and return the first, the request's base.

        drop_reader: called when the reader of deltas leaves more than MAX_UNREAD_BYTES unread; the
        request is aborted. Without it they are kept.
        Raises OverloadedError when they would exceed a limit, and as `_require_serving` does.
        """
        assert n >= 1
        self._require_serving()
        with self._counting_refusals():
            after = self._queue.waiting(len(self._owners) + n, len(self._unstarted) + n)
            limits = (self._max_waiting, self._max_queue_wait)
            self._queue.check_limits(n, self._num_waiting, after, *limits)
        base = self._reserve(n)
        request = OpenRequest(base, set(range(base, base + n)), request_id, drop_reader)
        self._requests[base] = request
        self._owners.update(dict.fromkeys(request.live, request))
        self._unstarted |= request.live
        self._recent_uids.pop(request_id, None)
        self._recent_uids[request_id] = range(base, base + n)
        if len(self._recent_uids) > MAX_RECENT:
            del self._recent_uids[next(iter(self._recent_uids))]
        return base

    def recent_uids(self, request_id: str) -> Sequence[int]:
        """The uids of the last request with this id, if it is one of the last MAX_RECENT."""
        return self._recent_uids.get(request_id, ())

    def _reserve(self, n: int) -> int:
        """The first of `n` uids. Raises OverloadedError past the limit, and as `model` does."""
        _ = self.model
        with self._counting_refusals():
            if self.num_open + n > self._max_open:
                raise OverloadedError(
                    f"the server has {self.num_open} open requests of {self._max_open}, "
                    f"and this one counts {n}; try again later",
                    reason="open_requests",
                    retry_after_s=self._queue.retry_after_s(self._num_waiting),
                )
        base = self._next_uid
        self._next_uid += n
        return base

    def send(self, message: TokenizeMsg) -> None:
        """Send a message to the next tokenizer in turn, or keep it until `resume`.

        One whose uids have ended is dropped. A seed, if it has none, and the time are set here, and
        stay the same when it is sent again. Raises OverloadedError if that inbox is full.
        """
        request = self._owners.get(message.uid)
        if request is None or request.aborted:
            return
        sampling = message.sampling
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(SEED_BITS))
        message = replace(message, sampling=sampling, sent_at=message.sent_at or time.time())
        if not self._on_hold:
            with self._counting_refusals():
                self._dispatch(request, message)
        request.messages.append(message)

    def _dispatch(self, request: OpenRequest, message: TokenizeMsg) -> None:
        assert self._send is not None
        index = next(self._tokenizers)
        self._send(index, message)
        uids = range(message.uid, message.uid + message.sampling.n)
        request.tokenizers.update(dict.fromkeys(uids, index))

    async def ask(
        self, make: Callable[[int], Query], tokenizer_index: int | None = None
    ) -> dict[str, Any]:
        """The answer to the query `make(number)`, by default from the next tokenizer in turn.

        It counts as an open request until it is answered. When the caller is cancelled, the query
        is aborted. Raises as `open` and `send`, RequestFailedError for a refused query,
        MinisrvError after a timeout.
        """
        self._require_serving()
        number = self._reserve(1)
        assert self._send is not None
        send = self._send
        index = next(self._tokenizers) if tokenizer_index is None else tokenizer_index

        def send_query() -> None:
            with self._counting_refusals():
                send(index, make(number))

        abort = AbortMsg(uids=(number,))
        return await self._queries.ask(number, send_query, lambda: send(index, abort))

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except OverloadedError as refusal:
            self.refused[refusal.reason] += 1
            raise

    def receive(self, message: UserReply | AnswerMsg | StatsMsg | PromptsMsg) -> None:
        """Handle a message from the other processes."""
        if isinstance(message, UserReply):
            self.deliver(message)
        elif isinstance(message, PromptsMsg):
            for uid, length in zip(message.uids, message.prompt_tokens, strict=True):
                if request := self._owners.get(uid):
                    request.prompt_lengths[uid] = length
        elif isinstance(message, AnswerMsg):
            self._queries.deliver(message)
        else:
            self.stats = message
            self._queue.take(message, len(self._unstarted), now := time.monotonic())
            self._status_line.take(message, now)

    def deliver(self, reply: UserReply) -> None:
        """Pass each part of `reply` to its request; parts of uids that are not open are dropped."""
        touched: dict[OpenRequest, None] = {}
        owner_of = self._owners.get

        def event_of(uid: int) -> Event | None:
            if (request := owner_of(uid)) is None:
                return None
            touched[request] = None
            event = request.pending.get(uid)
            if event is None:
                event = request.pending[uid] = Event(uid, uid - request.base)
            return event

        if reply.starts:
            self._unstarted.difference_update([start.uid for start in reply.starts])
        for event in gather_reply(reply, event_of, time.monotonic()):
            if (request := self._owners.get(event.uid)) is not None:
                request.failed |= event.failure is not None
                self._release(request, event.uid)
        for request in touched:
            request.end_delivery()
            if request.num_late and request.leaves_too_much():
                self._drop(request)

    def fail_all(self, error: MinisrvError) -> None:
        """Fail every open request and every later one with `error`; later calls do nothing."""
        if isinstance(self.state, Dead):
            return
        self.state = Dead(error)
        self._queries.fail_all(error)
        self.deliver(failure_reply([Failure.from_error(uid, error) for uid in self._owners]))

    def is_open(self, base: int) -> bool:
        """Whether `next_events` has something to return or to wait for."""
        request = self._requests.get(base)
        return request is not None and bool(request.live or request.pending or request.cancelled)

    async def next_events(self, base: int, timeout_s: float | None = None) -> list[Event]:
        """The events of a request since the last call, at most one per uid; waits for the first.

        Empty after `timeout_s` without events, or sooner if an earlier call's timeout ends first.
        Raises RequestAborted after `abort`.
        """
        request = self._reading(base, wants_deltas=True)
        if timeout_s is not None:
            request.end_silence(timeout_s)
        await request.wait()
        return request.take_events()

    async def all_events(self, base: int) -> list[Event]:
        """One event per uid with its whole text; returns early when one of them has failed.

        Raises RequestAborted after `abort`.
        """
        request = self._reading(base, wants_deltas=False)
        while not request.settled:
            request.changed = False
            await request.wait()
        return request.take_events()

    async def events(self, base: int) -> AsyncGenerator[Event, None]:
        """Events until each uid has had its final, or until `abort`; leaving early aborts."""
        try:
            while self.is_open(base):
                for event in await self.next_events(base):
                    yield event
        except RequestAborted:
            return
        finally:
            self.abort(base)

    def unread(self, base: int) -> list[Event]:
        """The events that no reader has taken, also after an abort by `cancel`."""
        request = self._requests.get(base)
        return [] if request is None else [*request.unread, *request.pending.values()]

    def prompt_lengths(self, base: int) -> list[int]:
        """The tokens of those prompts of an open request that have been read."""
        request = self._requests.get(base)
        return [*request.prompt_lengths.values()] if request else []

    def abort(self, base: int) -> bool:
        """Forget a request, known or not, and stop what still runs; whether anything did."""
        request = self._requests.pop(base, None)
        return request is not None and self._stop(request)

    def cancel(self, request_id: str | None, error: MinisrvError) -> int:
        """Stop the requests of an id (None: all) and raise `error` in their readers.

        Returns the number of requests stopped.
        """
        matching = [
            request
            for request in self._requests.values()
            if request_id in (None, request.request_id) and not request.aborted and request.live
        ]
        for request in matching:
            request.cancelled = error
            self._stop(request)
        return len(matching)

    def _drop(self, request: OpenRequest) -> None:
        assert request.drop_reader is not None
        self.num_dropped += 1
        self._stop(request)
        request.unread.clear()
        request.drop_reader()

    def _require_serving(self) -> None:
        """Raises NotReadyError while starting or draining, RequestFailedError when dead."""
        _ = self.model
        if isinstance(self.state, Draining):
            raise NotReadyError(STOPPING, code="server_draining")

    def _stop(self, request: OpenRequest) -> bool:
        """Stop what still runs; False if nothing did, or if it was stopped before."""
        if request.aborted:
            return False
        running = bool(request.live)
        request.close()
        by_tokenizer = defaultdict(list)
        for uid in sorted(request.live):
            if uid in request.tokenizers:
                by_tokenizer[request.tokenizers[uid]].append(uid)
            else:
                self._release(request, uid)
        assert self._send is not None
        for index, uids in by_tokenizer.items():
            self._send(index, AbortMsg(uids=tuple(uids)))
        return running

    def _release(self, request: OpenRequest, uid: int) -> None:
        request.live.discard(uid)
        self._unstarted.discard(uid)
        del self._owners[uid]
        if self._on_hold and request.aborted and uid in request.suspected_at:
            self._left[uid] = request

    def _reading(self, base: int, *, wants_deltas: bool) -> OpenRequest:
        request = self._requests.get(base)
        if request is None:
            raise RequestAborted
        request.wants_deltas = wants_deltas
        return request
