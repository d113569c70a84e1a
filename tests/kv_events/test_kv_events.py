"""Whoever follows the events knows what the cache holds, whatever happens to the events."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
import zmq

from minisrv.errors import ConfigError
from minisrv.kv_events.blocks import CachedBlocks
from minisrv.kv_events.publisher import Publisher
from minisrv.kvcache.manager import KVCacheManager, Lease
from minisrv.kvcache.tree_changes import TreeChanges
from minisrv.scheduler.tree_feed import TreeFeed
from minisrv.wire.codec import decode, encode
from minisrv.wire.messages import KV_EVENTS_INBOX, TreeChangesMsg
from tests.support.kv_event_reader import Reader, prefixes_of

BUFFER = 40


class Cache:
    """Random operations on a small cache, as the scheduler makes them."""

    def __init__(self, rng: Random, page_size: int) -> None:
        self.rng = rng
        self.manager = KVCacheManager(60, 6, page_size, radix_cache=True)
        self.leases: list[tuple[Lease, np.ndarray, int]] = []
        self.step = 0

    def operate(self) -> None:
        self.step += 1
        what = self.rng.random()
        if what < 0.5 and len(self.leases) < 6:
            self._open()
        elif what < 0.95 and self.leases:
            lease, tokens, computed = self.leases.pop(self.rng.randrange(len(self.leases)))
            self.manager.close_lease(lease, tokens, computed)
        else:
            self.manager.evict(self.rng.choice([1, 3, 60]))
        self.manager.settle(self.step)

    def _open(self) -> None:
        size, rng = self.manager.page_size, self.rng
        length = rng.randint(1, 6 * size)
        tokens = np.array([rng.choice([0, 0, 0, 1]) for _ in range(length)], np.int32)
        lease = self.manager.open_lease(rng.choice([b"", b"", b"a", "\N{SNOWMAN}b".encode()]))
        self.manager.extend_match(lease, tokens, 0, self.step)
        computed = self.manager.grow(lease, length)
        if rng.random() < 0.7:
            self.manager.share(lease, tokens, computed, self.step)
        self.leases.append((lease, tokens, computed))


class Link:
    """The scheduler's end of the link to the publisher; it may have no room."""

    def __init__(self) -> None:
        self.room = True
        self.frames: list[bytes] = []

    def has_room(self) -> bool:
        return self.room

    def send(self, message: TreeChangesMsg) -> None:
        self.frames.append(encode(message))

    def take(self) -> list[TreeChangesMsg]:
        frames, self.frames = self.frames, []
        return [decode(frame, KV_EVENTS_INBOX) for frame in frames]  # type: ignore[misc]


@pytest.fixture
def endpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    directory = tmp_path_factory.mktemp("kv")
    return f"ipc://{directory}/events", f"ipc://{directory}/replay"


@pytest.fixture
def publisher(endpoints: tuple[str, str]) -> Iterator[Publisher]:
    publisher = Publisher(*endpoints, "kv@here@model", BUFFER)
    yield publisher
    publisher.close()


def joined(publisher: Publisher, endpoints: tuple[str, str], page_size: int) -> Reader:
    """A reader whose subscription has arrived."""
    reader = Reader(*endpoints, page_size)
    while reader.receive(0.01) is None:
        publisher.publish([])
    publisher.publish([{"type": "the last one"}])
    while b"the last one" not in (reader.receive(60) or (b"", 0, b""))[2]:
        pass
    return reader


@pytest.mark.parametrize("num_operations", [2_000, pytest.param(100_000, marks=pytest.mark.soak)])
def test_an_index_made_from_the_events_equals_the_tree(
    num_operations: int, publisher: Publisher, endpoints: tuple[str, str]
) -> None:
    """Though the reader loses batches, the publisher is behind at times, and is started again."""
    rng = Random(num_operations)
    page_size = rng.choice([1, 2, 4])
    cache, link, blocks = Cache(rng, page_size), Link(), CachedBlocks(page_size)
    tree = cache.manager.tree
    feed = TreeFeed(tree, link)
    reader = joined(publisher, endpoints, page_size)
    num_published = num_lost = num_compared = newest = 0
    for _ in range(num_operations):
        cache.operate()
        if rng.random() < 0.001:
            blocks = CachedBlocks(page_size)
            link.frames.clear()
            feed.restart()
        link.room = rng.random() > 0.02
        feed.send(0.0, busy=False)
        for message in link.take():
            publisher.publish(blocks.apply(message))
            num_published += 1
        if rng.random() < 0.9:
            continue
        for _ in range(num_published):
            batch = reader.receive(60)
            assert batch is not None
            newest = batch[1]
            num_lost += rng.random() < 0.02 and rng.choice([3, BUFFER + 5])
            if num_lost:
                num_lost -= 1
            else:
                follow(reader, publisher, blocks, batch)
        num_published = 0
        if reader.last == newest and link.room:
            assert reader.index.prefixes() == prefixes_of(tree)
            num_compared += 1
    cache.manager.check([lease for lease, _, _ in cache.leases])
    reader.close()
    assert num_compared > num_operations / 100
    assert reader.num_replays > reader.num_wholes > 0


def follow(
    reader: Reader, publisher: Publisher, blocks: CachedBlocks, batch: tuple[bytes, int, bytes]
) -> None:
    """Apply a batch, after those that were missed."""
    _, number, content = batch
    if reader.misses(number):
        reader.ask(0 if reader.last is None else reader.last + 1)
        while not publisher.answer_replay(blocks.all_events):
            pass
        reader.take_replay()
    reader.apply(number, content)


def test_the_maps_have_the_keys_that_vllm_reads() -> None:
    changes, blocks = TreeChanges(), CachedBlocks(2)
    changes.store(-1, [7, 3], np.array([1, 2, 3, 4], np.int32), b"tenant")
    changes.store(3, [5], np.array([5, 6], np.int32), b"tenant")
    changes.remove([5])
    cleared, first, second, removed = blocks.apply(changes.message(begins=True))
    assert cleared == {"type": "AllBlocksCleared"}
    assert first == {
        "type": "BlockStored",
        "block_hashes": first["block_hashes"],
        "parent_block_hash": None,
        "token_ids": [1, 2, 3, 4],
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [["tenant"], None],
    }
    assert "extra_keys" not in second
    assert second["parent_block_hash"] == first["block_hashes"][1]
    assert removed == {
        "type": "BlockRemoved",
        "block_hashes": second["block_hashes"],
        "medium": "GPU",
    }
    assert all(0 <= hash < 2**64 for hash in first["block_hashes"])


def test_a_hash_depends_on_tokens_parents_and_salt_only() -> None:
    def hashes(above: int, pages: list[int], tokens: list[int], salt: bytes) -> list[int]:
        changes = TreeChanges()
        if above == 9:
            changes.store(-1, [9], np.array([8], np.int32), salt)
        changes.store(above, pages, np.array(tokens, np.int32), salt)
        stored = CachedBlocks(1).apply(changes.message(begins=True))[-1]["block_hashes"]
        assert isinstance(stored, list)
        return stored

    first = hashes(-1, [1, 2], [5, 5], b"")
    assert hashes(-1, [20, 10], [5, 5], b"") == first
    different = [
        *first,
        *hashes(-1, [1, 2], [5, 5], b"a"),
        *hashes(9, [1, 2], [5, 5], b""),
        *hashes(9, [1, 2], [5, 5], b"a"),
    ]
    assert len(set(different)) == len(different)


def test_between_steps_changes_are_sent_ten_times_a_second(
    caplog: pytest.LogCaptureFixture,
) -> None:
    link, cache = Link(), Cache(Random(0), 1)
    feed = TreeFeed(cache.manager.tree, link)
    feed.send(0.0, busy=True)
    (message,) = link.take()
    assert message.begins
    cache.manager.tree.insert(cache.manager.tree.root, np.array([1, 2], np.int32), [4, 5], 0)
    feed.send(0.05, busy=True)
    assert link.take() == []
    feed.send(0.06, busy=False)
    (message,) = link.take()
    assert (message.pages.tolist(), message.token_ids.tolist()) == ([2, -1, 4, 5], [1, 2])
    feed.send(0.5, busy=False)
    assert link.take() == []
    list(cache.manager.tree.evict(1))
    link.room = False
    with caplog.at_level(logging.WARNING):
        feed.send(0.6, busy=False)
        feed.send(0.9, busy=False)
    assert caplog.text.count("is behind") == 1
    link.room = True
    feed.send(1.2, busy=False)
    (message,) = link.take()
    assert message.begins
    assert message.pages.tolist() == [1, -1, 4]


def test_a_reader_that_does_not_read_costs_nothing(
    publisher: Publisher, endpoints: tuple[str, str]
) -> None:
    reader = joined(publisher, endpoints, 1)
    events = [{"type": "AllBlocksCleared", "padding": "x" * 10_000}]
    began = time.monotonic()
    for _ in range(3000):
        publisher.publish(events)
    assert time.monotonic() - began < 5
    first = reader.receive(1)
    assert first is not None
    numbers = [first[1]]
    while (batch := reader.receive(0.2)) is not None:
        numbers.append(batch[1])
    assert numbers == sorted(set(numbers))
    reader.close()


@pytest.mark.parametrize("request_frames", [[b"", b"short"], [b"x", bytes(8)], [bytes(8)]])
def test_a_request_for_a_replay_in_another_form_is_dropped(
    request_frames: list[bytes], publisher: Publisher, endpoints: tuple[str, str]
) -> None:
    reader = joined(publisher, endpoints, 1)
    reader._replay.send_multipart(request_frames)
    while not publisher.answer_replay(list):
        pass
    assert not reader._replay.poll(20)
    reader.ask(0)
    while not publisher.answer_replay(list):
        pass
    reader.take_replay()
    assert reader.num_wholes == 0 or reader.last is not None
    reader.close()


def test_a_reader_that_sends_too_much_is_disconnected(
    publisher: Publisher, endpoints: tuple[str, str]
) -> None:
    reader = joined(publisher, endpoints, 1)
    sender = zmq.Context.instance().socket(zmq.DEALER)
    sender.connect(endpoints[1])
    sender.send_multipart([b"", bytes(1_000_000)])
    reader.ask(0)
    while not publisher.answer_replay(list):
        pass
    reader.take_replay()  # so it was the reader's request that was answered
    assert not publisher.answer_replay(list)
    sender.close(linger=0)
    reader.close()


def test_a_whole_tree_is_packed_once_for_all_who_ask(
    publisher: Publisher, endpoints: tuple[str, str]
) -> None:
    reader = joined(publisher, endpoints, 1)
    for _ in range(BUFFER + 1):
        publisher.publish([])
    packed = []

    def all_events() -> list[dict[str, object]]:
        packed.append(1)
        return []

    for expected in (1, 1, 2):
        if expected == 2:
            publisher.publish([])
        reader.ask(0)
        while not publisher.answer_replay(all_events):
            pass
        reader.take_replay()
        assert len(packed) == expected
    reader.close()


def test_an_address_in_use_is_an_error_that_names_it(
    endpoints: tuple[str, str],
) -> None:
    taken = zmq.Context.instance().socket(zmq.PUB)
    port = taken.bind_to_random_port("tcp://127.0.0.1")
    with pytest.raises(ConfigError, match=f"readers of KV events at tcp://127.0.0.1:{port}"):
        Publisher(f"tcp://127.0.0.1:{port}", endpoints[1], "", 1)
    taken.close()
