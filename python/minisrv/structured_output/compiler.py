"""Grammars compiled on threads of their own, the last ones kept, while the engine goes on."""

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

# What a compiled grammar takes, measured: llguidance does not say.
_BYTES_EACH = 256 * 2**10
_BYTES_PER_BYTE = 100

Outcome = Matcher | MinisrvError
_Key = tuple[str, str, str]


@dataclass(slots=True, eq=False)
class _Job:
    """A grammar being compiled, and who waits for it since when."""

    grammar: Grammar
    future: Future[Matcher]
    since: float
    tickets: list[int] = field(default_factory=list)


class GrammarCompiler:
    """`request` gives a matcher at once, or later with the ticket from `take_done`.

    Grammars are kept, the last used longest, while they are estimated at no more than
    `max_cache_bytes`. All calls come from one thread.
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
        self._kept: OrderedDict[_Key, Matcher] = OrderedDict()
        self.cache_bytes = 0

    def request(self, grammar: Grammar, ticket: int) -> Matcher | None:
        """A new matcher if the grammar is kept; else None, and it is being compiled."""
        key = (grammar.kind, grammar.text, grammar.before)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key].copy()
        if key not in self._jobs:
            future = self._threads.submit(_compile, self._vocabulary, grammar)
            self._jobs[key] = _Job(grammar, future, self._clock())
        self._jobs[key].tickets.append(ticket)
        return None

    def take_done(self) -> list[tuple[int, Outcome]]:
        """What has come of grammars since the last call, each ticket once."""
        outcomes: list[tuple[int, Outcome]] = []
        for key, job in list(self._jobs.items()):
            if job.future.done():
                del self._jobs[key]
                outcomes += self._outcomes(key, job)
            elif job.tickets and self._clock() - job.since > self._timeout_s:
                error = InvalidRequestError(
                    f"{job.grammar.param} was not compiled within {self._timeout_s:g} s; "
                    "a smaller one may be",
                    param=job.grammar.param,
                )
                outcomes += [(ticket, error) for ticket in job.tickets]
                job.tickets.clear()
        return outcomes

    def wait(self, timeout_s: float) -> None:
        """Block until something is done, at most `timeout_s`."""
        wait([job.future for job in self._jobs.values()], timeout_s, "FIRST_COMPLETED")

    def close(self) -> None:
        """Let the threads end; what they are at is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _outcomes(self, key: _Key, job: _Job) -> list[tuple[int, Outcome]]:
        error = job.future.exception()
        if error is not None:
            failure = error if isinstance(error, MinisrvError) else _unforeseen(error)
            failure.param = job.grammar.param
            return [(ticket, failure) for ticket in job.tickets]
        matcher = job.future.result()
        self._keep(key, matcher)
        return [(ticket, matcher.copy()) for ticket in job.tickets]

    def _keep(self, key: _Key, matcher: Matcher) -> None:
        self._kept[key] = matcher
        self.cache_bytes += _estimate(key)
        while self.cache_bytes > self._max_cache_bytes:
            oldest, _ = self._kept.popitem(last=False)
            self.cache_bytes -= _estimate(oldest)


def _compile(vocabulary: Vocabulary, grammar: Grammar) -> Matcher:
    return vocabulary.compile(to_source(grammar))


def _unforeseen(error: BaseException) -> MinisrvError:
    logger.error("a grammar cannot be compiled", exc_info=error)
    return MinisrvError("the grammar could not be compiled")


def _estimate(key: _Key) -> int:
    return _BYTES_EACH + _BYTES_PER_BYTE * len(key[1])
