"""A reader of KV events as a router has one: it keeps an index, and asks for what it has missed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgpack
import zmq

from minisrv.kvcache.radix_tree import RadixTree

Prefix = tuple[str, tuple[int, ...]]  # salt and token ids


@dataclass
class Index:
    """The blocks by hash: parent, token ids, salt."""

    page_size: int
    blocks: dict[int, tuple[int | None, tuple[int, ...], str]] = field(default_factory=dict)

    def apply(self, event: dict[str, Any]) -> None:
        match event["type"]:
            case "AllBlocksCleared":
                self.blocks.clear()
            case "BlockRemoved":
                for hash in event["block_hashes"]:
                    del self.blocks[hash]
            case "BlockStored":
                self._store(event)

    def _store(self, event: dict[str, Any]) -> None:
        size, parent, ids = self.page_size, event["parent_block_hash"], event["token_ids"]
        assert event["block_size"] == size
        assert parent is None or parent in self.blocks
        assert len(ids) == len(event["block_hashes"]) * size
        extra = event.get("extra_keys") or [None] * len(event["block_hashes"])
        for i, (hash, keys) in enumerate(zip(event["block_hashes"], extra, strict=True)):
            salt = "".join(keys or [])
            assert not salt or parent is None
            assert hash not in self.blocks
            self.blocks[hash] = parent, tuple(ids[i * size : (i + 1) * size]), salt
            parent = hash

    def prefixes(self) -> set[Prefix]:
        """What a request can find in the cache, one for each block."""
        found: dict[int | None, Prefix] = {}
        for hash, (parent, ids, salt) in self.blocks.items():
            above = found[parent] if parent is not None else (salt, ())
            found[hash] = above[0], above[1] + ids
        assert len(set(found.values())) == len(self.blocks)
        return set(found.values())


def prefixes_of(tree: RadixTree) -> set[Prefix]:
    """The oracle: the same, read from the tree."""
    size, found = tree.page_size, set[Prefix]()
    waiting: list[tuple[Any, Prefix | None]] = [(tree.root, None)]
    for node, above in waiting:
        prefix = above
        if node is not tree.root:
            salt = above[0] if above else node.key[: -4 * size].decode()
            start = above[1] if above else ()
            ids = tuple(node.tokens.tolist())
            for end in range(size, len(ids) + 1, size):
                found.add((salt, start + ids[:end]))
            prefix = salt, start + ids
        waiting += [(child, prefix) for child in node.children.values()]
    return found


class Reader:
    """Subscribes, and brings `index` to the state after the batches that have arrived."""

    def __init__(self, endpoint: str, replay_endpoint: str, page_size: int) -> None:
        context = zmq.Context.instance()
        self.index = Index(page_size)
        self.last: int | None = None
        self.num_replays = self.num_wholes = 0
        self.events: list[dict[str, Any]] = []
        self._sub: Any = context.socket(zmq.SUB)
        self._sub.setsockopt(zmq.RCVHWM, 0)
        self._sub.setsockopt(zmq.SUBSCRIBE, b"")
        self._sub.connect(endpoint)
        self._replay: Any = context.socket(zmq.DEALER)
        self._replay.setsockopt(zmq.LINGER, 0)
        self._replay.connect(replay_endpoint)

    def receive(self, timeout_s: float = 0.0) -> tuple[bytes, int, bytes] | None:
        """The next batch of the subscription."""
        if not self._sub.poll(int(timeout_s * 1000)):
            return None
        topic, number, batch = self._sub.recv_multipart()
        return topic, int.from_bytes(number, "big"), batch

    def misses(self, number: int) -> bool:
        """Whether there are batches between the last one and this."""
        return self.last is None or number > self.last + 1

    def ask(self, first: int) -> None:
        """Ask for the batches from `first` on; the publisher answers when it runs."""
        self._replay.send_multipart([b"", first.to_bytes(8, "big")])

    def take_replay(self) -> None:
        """Apply the answer."""
        assert self._replay.poll(60_000)
        self.num_replays += 1
        for number, batch in self._replies():
            if self.misses(number):
                self.num_wholes += 1
            self.apply(number, batch)

    def _replies(self) -> Iterator[tuple[int, bytes]]:
        while True:
            empty, _, number, batch = self._replay.recv_multipart()
            assert not empty
            if not batch:
                assert number == (-1).to_bytes(8, "big", signed=True)
                return
            yield int.from_bytes(number, "big"), batch

    def apply(self, number: int, batch: bytes) -> None:
        """Apply a batch, unless it is known."""
        if self.last is not None and number <= self.last:
            return
        _, events, rank = msgpack.unpackb(batch)
        assert rank == 0
        for event in events:
            self.index.apply(event)
        self.events += events
        self.last = number

    def close(self) -> None:
        self._sub.close(0)
        self._replay.close(0)
