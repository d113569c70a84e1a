"""Which beginnings of prompts each server has probably in its cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

from minisrv.wire.arrays import Int32Array


def hash_blocks(token_ids: Int32Array, block_tokens: int, key: bytes = b"") -> list[int]:
    """One number for each block of a prompt, which depends on all tokens up to its end.

    The last block may be a part. key: at most 64 bytes; with a secret one nobody can find a prompt
    that has the numbers of another.
    """
    digest, numbers = b"", list[int]()
    for start in range(0, len(token_ids), block_tokens):
        block = np.ascontiguousarray(token_ids[start : start + block_tokens], np.int32)
        digest = blake2b(digest + block.tobytes(), digest_size=16, key=key).digest()
        numbers.append(int.from_bytes(digest[:8]))
    return numbers


class PrefixIndex:
    """The `capacity` most recently used blocks of each replica, numbered as in `hash_blocks`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._known: dict[int, OrderedDict[int, None]] = {}

    def num_matching(self, replica: int, blocks: Sequence[int]) -> int:
        """How many blocks at the beginning of a prompt the replica has."""
        known = self._known.get(replica)
        if known is None:
            return 0
        for number, block in enumerate(blocks):
            if block not in known:
                return number
        return len(blocks)

    def add(self, replica: int, blocks: Sequence[int]) -> None:
        """The replica gets a prompt. Its end is dropped before its beginning."""
        known = self._known.setdefault(replica, OrderedDict())
        for block in reversed(blocks):
            known[block] = None
            known.move_to_end(block)
        while len(known) > self.capacity:
            known.popitem(last=False)

    def remove(self, replica: int, blocks: Iterable[int]) -> None:
        """The replica has evicted these blocks."""
        known = self._known.get(replica, OrderedDict())
        for block in blocks:
            known.pop(block, None)

    def forget(self, replica: int) -> None:
        """The replica has nothing any more."""
        self._known.pop(replica, None)

    def num_blocks(self, replica: int) -> int:
        """How many blocks of the replica are known."""
        return len(self._known.get(replica, ()))
