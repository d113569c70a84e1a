"""Grammars in the scheduler process: matchers for requests, and the masks of a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minisrv.errors import MinisrvError
from minisrv.sampling_params import Grammar
from minisrv.scheduler.request import Request, Status, outputs_so_far
from minisrv.scheduler.scheduler import Scheduler
from minisrv.structured_output.compiler import GrammarCompiler
from minisrv.structured_output.matcher import Matcher
from minisrv.wire.arrays import Int32Array
from minisrv.wire.messages import GenerateMsg


class Grammars:
    """Gives requests their matchers, at once or when the grammar is compiled."""

    def __init__(self, scheduler: Scheduler, compiler: GrammarCompiler) -> None:
        self._scheduler = scheduler
        self._compiler = compiler

    def request(self, message: GenerateMsg) -> None:
        """Request a matcher for each choice of a request that was just added to the scheduler."""
        assert message.sampling.grammar is not None
        for uid in outputs_so_far(message):
            try:
                matcher = self._compiler.request(message.sampling.grammar, uid)
            except MinisrvError as error:
                self._scheduler.fail_request(uid, error)
            else:
                if matcher is not None:
                    self._scheduler.set_matcher(uid, matcher)

    def drop_requests(self) -> None:
        """Forget who waits for a grammar; their uids may be given to other requests."""
        self._compiler.drop_tickets()

    def compile(self, grammar: Grammar) -> None:
        """Compile a grammar before its request comes. Raises MinisrvError."""
        self._compiler.compile(grammar)

    def deliver(self) -> None:
        """Set the matchers compiled since the last call, and fail what does not compile."""
        for uid, outcome in self._compiler.take_done():
            if isinstance(outcome, Matcher):
                self._scheduler.set_matcher(uid, outcome)
            else:
                self._scheduler.fail_request(uid, outcome)

    def wait(self, timeout_s: float) -> None:
        """Block until a grammar is compiled, at most `timeout_s`."""
        self._compiler.wait(timeout_s)

    def close(self) -> None:
        """End the processes and threads that compile grammars."""
        self._compiler.close()

    def masks(self, requests: Sequence[Request]) -> Int32Array:
        """The allowed next tokens, one row of bits per request, whose earlier steps are settled."""
        masks = np.empty((len(requests), self._compiler.num_words), np.int32)
        for words, request in zip(masks, requests, strict=True):
            if request.status is Status.FINISHED:  # its token will be dropped
                words.fill(-1)
                continue
            assert request.matcher is not None
            request.matcher.fill(words, request.suppressed_ids)
        return masks
