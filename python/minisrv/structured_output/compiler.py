"""Compiles grammars in background threads, with a cache, while the engine keeps running.

A thread first lets the sandbox try a grammar out. Two threads work at once, in order of arrival, so
a grammar waits no longer than those before it may take.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from minisrv.errors import InvalidRequestError, MinisrvError, OverloadedError
from minisrv.sampling_params import Grammar
from minisrv.structured_output.matcher import CompiledGrammar, Matcher
from minisrv.structured_output.sandbox import Sandbox
from minisrv.structured_output.source import to_source
from minisrv.structured_output.vocabulary import Vocabulary

logger = logging.getLogger("minisrv.grammar")

MAX_CACHE_BYTES = 128 * 2**20
# Of all compiled grammars, those of running requests included. One more than that may be compiled.
MAX_HELD_BYTES = 2**30
_NUM_THREADS = 2

# Measured memory of a compiled grammar; llguidance does not report it. What the sandbox measures
# counts only where it is more, because a fork copies some pages anyway.
_NOISE_BYTES = 16 * 2**20
_BYTES_EACH = 256 * 2**10
_BYTES_PER_BYTE = 100

_MAX_REFUSALS = 256
REFUSAL_SECONDS = 60.0

Outcome = Matcher | MinisrvError
_Key = tuple[str, str, str]
_Compiled = tuple[Matcher, int]  # and its bytes


@dataclass(slots=True, eq=False)
class _Job:
    """A grammar that is being compiled, and the tickets that wait for it."""

    grammar: Grammar
    future: Future[_Compiled]
    tickets: list[int] = field(default_factory=list)


class GrammarCompiler:
    """`request` returns a matcher at once, or `take_done` returns it later with the ticket.

    Compiled grammars are cached up to an estimated `max_cache_bytes`; the least recently used are
    dropped first. Running requests hold others; beyond `max_held_bytes` in all, new grammars are
    refused until some of these requests have ended. The last refusals are remembered for
    REFUSAL_SECONDS, since a grammar may exceed its time because the machine is busy. All methods
    must be called from one thread.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        sandbox: Sandbox | None = None,
        *,
        max_cache_bytes: int = MAX_CACHE_BYTES,
        max_held_bytes: int = MAX_HELD_BYTES,
    ) -> None:
        self.num_words = vocabulary.num_words
        self._vocabulary = vocabulary
        self._sandbox = sandbox or Sandbox(vocabulary.source)
        self._max_cache_bytes, self._max_held_bytes = max_cache_bytes, max_held_bytes
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")
        self._jobs: dict[_Key, _Job] = {}
        self._cache: OrderedDict[_Key, _Compiled] = OrderedDict()
        self._refusals: OrderedDict[Grammar, tuple[InvalidRequestError, float]] = OrderedDict()
        self.cache_bytes = 0
        self._held: WeakKeyDictionary[CompiledGrammar, int] = WeakKeyDictionary()

    @property
    def held_bytes(self) -> int:
        """The estimated memory of the compiled grammars in the cache and of running requests."""
        return sum(self._held.values())

    def request(self, grammar: Grammar, ticket: int) -> Matcher | None:
        """A new matcher if the grammar is cached; otherwise starts to compile it, returns None.

        Raises InvalidRequestError if the grammar was refused before, OverloadedError if the
        grammars of running requests take too much memory for a new one.
        """
        key = (grammar.kind, grammar.text, grammar.before)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key][0].copy()
        self._raise_refusal(grammar)
        if key not in self._jobs:
            self._check_memory()
            future = self._threads.submit(self._compile, grammar)
            self._jobs[key] = _Job(grammar, future)
        self._jobs[key].tickets.append(ticket)
        return None

    def compile(self, grammar: Grammar) -> None:
        """Compile now, so that `request` finds the grammar in the cache. Raises MinisrvError."""
        key = (grammar.kind, grammar.text, grammar.before)
        if key not in self._cache:
            self._add_to_cache(key, self._compile(grammar))

    def take_done(self) -> list[tuple[int, Outcome]]:
        """Matchers and errors since the last call; each ticket appears once."""
        outcomes: list[tuple[int, Outcome]] = []
        for key, job in list(self._jobs.items()):
            if job.future.done():
                del self._jobs[key]
                outcomes += self._outcomes(key, job)
        return outcomes

    def drop_tickets(self) -> None:
        """Forget who waits: what is being compiled is only cached, unless it is requested again."""
        for job in self._jobs.values():
            job.tickets.clear()

    def wait(self, timeout_s: float) -> None:
        """Block until a compilation finishes, at most `timeout_s`."""
        wait([job.future for job in self._jobs.values()], timeout_s, "FIRST_COMPLETED")

    def close(self) -> None:
        """End the sandbox, and the threads after their current work, whose result is dropped."""
        self._sandbox.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _raise_refusal(self, grammar: Grammar) -> None:
        refusal, until = self._refusals.get(grammar, (None, 0.0))
        if refusal is not None and time.monotonic() < until:
            raise refusal

    def _check_memory(self) -> None:
        if (held := self.held_bytes) >= self._max_held_bytes:
            raise OverloadedError(
                f"the grammars of the running requests take {held // 2**20} MiB; a new grammar is "
                "compiled when some of them have ended",
                reason="grammar_memory",
            )

    def _compile(self, grammar: Grammar) -> _Compiled:
        self._vocabulary.load()  # its error is clearer than that of a sandbox that cannot start
        grown = self._sandbox.try_out(grammar)
        num_bytes = _BYTES_EACH + _BYTES_PER_BYTE * len(grammar.text)
        if grown > _NOISE_BYTES:
            num_bytes = max(num_bytes, grown)
        return self._vocabulary.compile(to_source(grammar)), num_bytes

    def _outcomes(self, key: _Key, job: _Job) -> list[tuple[int, Outcome]]:
        error = job.future.exception()
        if error is not None:
            failure = error if isinstance(error, MinisrvError) else _unexpected(error)
            failure.param = failure.param or job.grammar.param
            if isinstance(failure, InvalidRequestError):
                self._refusals[job.grammar] = (failure, time.monotonic() + REFUSAL_SECONDS)
                self._refusals.move_to_end(job.grammar)
                if len(self._refusals) > _MAX_REFUSALS:
                    self._refusals.popitem(last=False)
            return [(ticket, failure) for ticket in job.tickets]
        compiled = job.future.result()
        self._add_to_cache(key, compiled)
        return [(ticket, compiled[0].copy()) for ticket in job.tickets]

    def _add_to_cache(self, key: _Key, compiled: _Compiled) -> None:
        matcher, num_bytes = compiled
        self._held[matcher.compiled] = num_bytes
        self._cache[key] = compiled
        self.cache_bytes += num_bytes
        while self.cache_bytes > self._max_cache_bytes:
            _, (_, num_bytes) = self._cache.popitem(last=False)
            self.cache_bytes -= num_bytes


def _unexpected(error: BaseException) -> MinisrvError:
    logger.error("unexpected error while compiling a grammar", exc_info=error)
    return MinisrvError("the grammar could not be compiled")
