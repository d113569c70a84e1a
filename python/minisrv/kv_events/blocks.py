"""The blocks of the cache, and the events that report their changes in vLLM's form.

A block is a page of the radix tree. Its hash covers its token ids, the hash of the block before it
and, in the first block of a prompt, the salt. So equal prompts have equal hashes, in every server
with pages of this size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minisrv.kvcache.tree_changes import NO_PAGE
from minisrv.wire.messages import TreeChangesMsg

Event = dict[str, Any]
MEDIUM = "GPU"  # consumers take it for the engine's own memory, as opposed to tiers below


@dataclass(frozen=True, slots=True)
class Block:
    """A page of tokens. parent: the hash of the block before it, if it is not a prompt's first."""

    parent: int | None
    tokens: bytes  # little-endian int32
    salt: str = ""  # only in the first block

    @property
    def hash(self) -> int:
        """64 bits of BLAKE2b."""
        if self.parent is None:
            content = b"\0" + self.tokens + self.salt.encode()
        else:
            content = b"\1" + self.parent.to_bytes(8, "little") + self.tokens
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class CachedBlocks:
    """The blocks that the scheduler has reported, by hash and by page."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._blocks: dict[int, Block] = {}  # each after its parent
        self._hashes: dict[int, int] = {}  # of the pages

    def apply(self, message: TreeChangesMsg) -> list[Event]:
        """Follow the changes of a message; returns the events that report them."""
        events: list[Event] = []
        if message.begins:
            self._blocks.clear()
            self._hashes.clear()
            events.append({"type": "AllBlocksCleared"})
        pages, salts, at = message.pages.tolist(), iter(message.salts), 0
        token_ids, taken = message.token_ids.astype("<i4").tobytes(), 0
        while at < len(pages):
            count, first = pages[at], at + 1
            if count < 0:
                at = first - count
                events.append(self._remove(pages[first:at]))
                continue
            above, at = pages[first], first + 1 + count
            start, taken = taken, taken + 4 * count * self._page_size
            salt = next(salts) if above == NO_PAGE else ""
            tokens = token_ids[start:taken]
            events.append(self._store(above, pages[first + 1 : at], tokens, salt))
        return events

    def all_events(self) -> list[Event]:
        """The events that lead from any state to this one."""
        runs: list[list[int]] = []
        for hash, block in self._blocks.items():
            if runs and runs[-1][-1] == block.parent:
                runs[-1].append(hash)
            else:
                runs.append([hash])
        return [{"type": "AllBlocksCleared"}, *map(self._stored, runs)]

    def _store(self, above: int, pages: Sequence[int], tokens: bytes, salt: str) -> Event:
        parent = None if above == NO_PAGE else self._hashes[above]
        hashes, size = list[int](), 4 * self._page_size
        for i, page in enumerate(pages):
            block = Block(parent, tokens[i * size : (i + 1) * size], "" if i else salt)
            parent = self._hashes[page] = block.hash
            self._blocks[parent] = block
            hashes.append(parent)
        return self._stored(hashes)

    def _remove(self, pages: Sequence[int]) -> Event:
        hashes = [self._hashes.pop(page) for page in pages]
        for hash in hashes:
            del self._blocks[hash]
        return {"type": "BlockRemoved", "block_hashes": hashes, "medium": MEDIUM}

    def _stored(self, hashes: Sequence[int]) -> Event:
        """The event for blocks of which each is the parent of the next."""
        blocks = [self._blocks[hash] for hash in hashes]
        event = {
            "type": "BlockStored",
            "block_hashes": list(hashes),
            "parent_block_hash": blocks[0].parent,
            "token_ids": np.frombuffer(b"".join(b.tokens for b in blocks), "<i4").tolist(),
            "block_size": self._page_size,
            "lora_id": None,
            "medium": MEDIUM,
            "lora_name": None,
        }
        if salt := blocks[0].salt:
            event["extra_keys"] = [[salt], *[None] * (len(blocks) - 1)]
        return event
