"""Token ids for the requests of a trace, which only says how long they are and what they share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minisrv.bench.traces import BLOCK_TOKENS, TraceRequest
from minisrv.wire.arrays import Int32Array


class PromptMaker:
    """Equal blocks get equal ids, all others get ids of their own, none of them negative.

    block_tokens: tokens of a block, if the lengths of the trace have been divided.
    """

    def __init__(self, block_tokens: int = BLOCK_TOKENS) -> None:
        self.block_tokens = block_tokens
        self._blocks: dict[int, int] = {}
        self._num_blocks = 0

    def blocks(self, request: TraceRequest) -> list[int]:
        """The blocks of a prompt in order, numbered from 0 over all requests."""
        count = -(-request.input_tokens // self.block_tokens)
        if not request.block_ids:
            return self._new_blocks(count)
        return [
            self._blocks[block] if block in self._blocks else self._first_use(block)
            for block in request.block_ids[:count]
        ]

    def token_ids(self, blocks: Sequence[int], num_tokens: int) -> Int32Array:
        """The prompt of these blocks: [num_tokens]."""
        firsts = np.array(blocks, np.int64) * self.block_tokens
        ids = firsts[:, None] + np.arange(self.block_tokens)
        return (ids.reshape(-1)[:num_tokens] & 0x7FFFFFFF).astype(np.int32)

    def _first_use(self, block: int) -> int:
        self._blocks[block] = self._new_blocks(1)[0]
        return self._blocks[block]

    def _new_blocks(self, count: int) -> list[int]:
        first = self._num_blocks
        self._num_blocks += count
        return list(range(first, self._num_blocks))
