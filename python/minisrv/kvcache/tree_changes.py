"""What joins and leaves the radix tree, for a process that publishes it.

A page id stands for the same tokens from when it is stored until it is removed, so the receiver
needs no other name for it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from minisrv.wire.arrays import Int32Array
from minisrv.wire.messages import TreeChangesMsg

NO_PAGE = -1  # above the first page of a prompt
_NO_TOKENS = np.empty(0, np.int32)


class TreeChanges:
    """The changes since the last `clear`. Recording one takes about a microsecond."""

    def __init__(self) -> None:
        self._pages: list[int] = []
        self._tokens: list[Int32Array] = []
        self._salts: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._pages)

    def store(self, above: int, pages: Sequence[int], tokens: Int32Array, salt: bytes) -> None:
        """`pages` with `tokens` have joined the tree below the page `above`."""
        self._pages += (len(pages), above)
        self._pages += pages
        self._tokens.append(tokens)
        if above == NO_PAGE:
            self._salts.append(salt.decode())

    def remove(self, pages: Sequence[int]) -> None:
        """`pages` have left the tree."""
        self._pages.append(-len(pages))
        self._pages += pages

    def clear(self) -> None:
        self._pages.clear()
        self._tokens.clear()
        self._salts.clear()

    def message(self, *, begins: bool) -> TreeChangesMsg:
        """All changes in order. begins: they are those of an empty tree."""
        return TreeChangesMsg(
            pages=np.frombuffer(array("i", self._pages), np.int32),
            token_ids=np.concatenate([_NO_TOKENS, *self._tokens]),
            salts=tuple(self._salts),
            begins=begins,
        )
