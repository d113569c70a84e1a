"""The state of one text in its grammar: which tokens may come next, and whether it is complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from minisrv.wire.arrays import Int32Array

if TYPE_CHECKING:
    from llguidance import LLMatcher


class CompiledGrammar:
    """Stands for the memory that the matchers of one grammar share."""


class Matcher:
    """The state after all tokens given to `advance`.

    error: set permanently once the grammar became too complex to continue, or a token did not fit.
    misfit: the latter, which a mask rules out: a fault of the engine, not of the grammar.
    compiled: shared with all copies; it lives as long as the memory of the compiled grammar.
    """

    def __init__(self, inner: LLMatcher, compiled: CompiledGrammar | None = None) -> None:
        self._inner = inner
        self.compiled = compiled or CompiledGrammar()
        self.error: str | None = None
        self.misfit = False

    def copy(self) -> Matcher:
        """An independent copy of the state; the compiled grammar is shared."""
        return Matcher(self._inner.deep_copy(), self.compiled)

    @property
    def ended(self) -> bool:
        """Whether only an end-of-text token may come next."""
        return self.error is None and self._inner.is_stopped()

    @property
    def accepts(self) -> bool:
        """Whether the text so far is complete."""
        return self.error is None and self._inner.is_accepting()

    def advance(self, token_id: int) -> None:
        if self.error is None and not self._inner.consume_token(token_id):
            self._fail()
            self.misfit = "doesn't satisfy the grammar" in self._inner.get_error()

    def fill(self, words: Int32Array, banned: Sequence[int] = ()) -> None:
        """Write the mask of tokens that may come next: bit i of word w allows token 32 * w + i.

        Tokens in `banned` are excluded, unless no others are left. After an error all are allowed.
        """
        if self.error is None:
            self._inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            if self._inner.is_error():
                self._fail()
        if self.error is not None:
            words.fill(-1)
        elif banned:
            _ban(words, banned)

    def _fail(self) -> None:
        lines = self._inner.get_error().splitlines() or [""]
        self.error = f"the text cannot be continued within its grammar: {lines[0][:200]}"


def _ban(words: Int32Array, banned: Sequence[int]) -> None:
    before = words.copy()
    for token_id in banned:
        words[token_id // 32] &= ~np.int32(np.uint32(1 << token_id % 32).view(np.int32))
    if not words.any():
        words[:] = before
