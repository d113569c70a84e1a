"""Compiles grammars in background threads, with a cache, while the engine keeps running."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from minisrv.errors import InvalidRequestError, MinisrvError
from minisrv.sampling_params import Grammar
from minisrv.structured_output.matcher import Matcher
from minisrv.structured_output.source import to_source
from minisrv.structured_output.vocabulary import Vocabulary

logger = logging.getLogger("minisrv.grammar")

MAX_CACHE_BYTES = 128 * 2**20
TIMEOUT_S = 20.0
_NUM_THREADS = 2

# Measured memory of a compiled grammar; llguidance does not report it.
_BYTES_EACH = 256 * 2**10
_BYTES_PER_BYTE = 100

Outcome = Matcher | MinisrvError
_Key = tuple[str, str, str]


@dataclass(slots=True, eq=False)
class _Job:
    """A grammar that is being compiled since `since`, and the tickets that wait for it."""

    grammar: Grammar
    future: Future[Matcher]
    since: float
    tickets: list[int] = field(default_factory=list)


class GrammarCompiler:
    """`request` returns a matcher at once, or `take_done` returns it later with the ticket.

    Compiled grammars are cached up to an estimated `max_cache_bytes`; the least recently used are
    dropped first. All methods must be called from one thread.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        max_cache_bytes: int = MAX_CACHE_BYTES,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_words = vocabulary.num_words
        self._vocabulary = vocabulary
        self._max_cache_bytes, self._timeout_s = max_cache_bytes, timeout_s
        self._clock = clock
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")
        self._jobs: dict[_Key, _Job] = {}
        self._cache: OrderedDict[_Key, Matcher] = OrderedDict()
        self.cache_bytes = 0

    def request(self, grammar: Grammar, ticket: int) -> Matcher | None:
        """A new matcher if the grammar is cached; otherwise starts to compile it, returns None."""
        key = (grammar.kind, grammar.text, grammar.before)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key].copy()
        if key not in self._jobs:
            future = self._threads.submit(_compile, self._vocabulary, grammar)
            self._jobs[key] = _Job(grammar, future, self._clock())
        self._jobs[key].tickets.append(ticket)
        return None

    def take_done(self) -> list[tuple[int, Outcome]]:
        """Matchers and errors since the last call; each ticket appears once."""
        outcomes: list[tuple[int, Outcome]] = []
        for key, job in list(self._jobs.items()):
            if job.future.done():
                del self._jobs[key]
                outcomes += self._outcomes(key, job)
            elif job.tickets and self._clock() - job.since > self._timeout_s:
                error = InvalidRequestError(
                    f"{job.grammar.param} was not compiled within {self._timeout_s:g} s; "
                    "use a smaller grammar",
                    param=job.grammar.param,
                )
                outcomes += [(ticket, error) for ticket in job.tickets]
                job.tickets.clear()
        return outcomes

    def wait(self, timeout_s: float) -> None:
        """Block until a compilation finishes, at most `timeout_s`."""
        wait([job.future for job in self._jobs.values()], timeout_s, "FIRST_COMPLETED")

    def close(self) -> None:
        """Stop the threads once their current work is done; its result is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _outcomes(self, key: _Key, job: _Job) -> list[tuple[int, Outcome]]:
        error = job.future.exception()
        if error is not None:
            failure = error if isinstance(error, MinisrvError) else _unexpected(error)
            failure.param = job.grammar.param
            return [(ticket, failure) for ticket in job.tickets]
        matcher = job.future.result()
        self._add_to_cache(key, matcher)
        return [(ticket, matcher.copy()) for ticket in job.tickets]

    def _add_to_cache(self, key: _Key, matcher: Matcher) -> None:
        self._cache[key] = matcher
        self.cache_bytes += _estimate(key)
        while self.cache_bytes > self._max_cache_bytes:
            oldest, _ = self._cache.popitem(last=False)
            self.cache_bytes -= _estimate(oldest)


def _compile(vocabulary: Vocabulary, grammar: Grammar) -> Matcher:
    return vocabulary.compile(to_source(grammar))


def _unexpected(error: BaseException) -> MinisrvError:
    logger.error("unexpected error while compiling a grammar", exc_info=error)
    return MinisrvError("the grammar could not be compiled")


def _estimate(key: _Key) -> int:
    return _BYTES_EACH + _BYTES_PER_BYTE * len(key[1])
