"""The sockets from which routers read events of the cache, as they read them from vLLM.

PUB sends [topic, sequence, batch]: the sequence is 8 bytes, big-endian, and a batch is msgpack of
[Unix time, events, data-parallel rank]. A subscriber that reads too slowly loses batches, which it
can see in the sequence.

ROUTER takes [empty, first sequence] and answers with [empty, topic, sequence, batch] for each batch
from there on, and at the end [empty, empty, -1, empty]. If it does not have the first one any more,
one batch with the latest sequence makes up for all: it clears the index and stores every block.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgpack
import zmq

from minisrv.errors import ConfigError
from minisrv.kv_events.blocks import Event

logger = logging.getLogger("minisrv.kv_events")

HIGH_WATER = 1000  # batches that wait for one subscriber
MAX_REPLAYS = 2  # of the whole buffer, that wait for one client
MAX_REQUEST_BYTES = 4096  # of a subscription or a request; who sends more is disconnected
_RANK = 0
_END = (-1).to_bytes(8, "big", signed=True)


class Publisher:
    """Numbers batches and sends them; keeps the last `buffer` for `replay_endpoint`, if given.

    The numbers go on from the time in 2**-20 s, so that they do not go back when a server is
    started again: for its subscribers that is a gap like any other.
    Raises ConfigError if it cannot listen.
    """

    def __init__(self, endpoint: str, replay_endpoint: str | None, topic: str, buffer: int) -> None:
        self._topic = topic.encode()
        self._next = int(time.time() * 2**20)
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer)
        self._whole: tuple[int, bytes] | None = None
        self._pub = _bind(zmq.PUB, endpoint, HIGH_WATER)
        self.replay_socket: Any = None
        if replay_endpoint is not None:
            self.replay_socket = _bind(zmq.ROUTER, replay_endpoint, MAX_REPLAYS * buffer + 1)

    def publish(self, events: list[Event]) -> None:
        """Send a batch; never waits."""
        batch = pack(events)
        self._pub.send_multipart((self._topic, self._next.to_bytes(8, "big"), batch))
        if self.replay_socket is not None:
            self._buffer.append((self._next, batch))
        self._next += 1

    def answer_replay(self, all_events: Callable[[], list[Event]]) -> bool:
        """Answer one request for a replay, if there is one; returns whether there was.

        all_events: what makes up for batches that are not kept any more. Never waits.
        """
        if self.replay_socket is None or not self.replay_socket.poll(0):
            return False
        client, *rest = self.replay_socket.recv_multipart()
        if len(rest) != 2 or rest[0] or len(rest[1]) != 8:
            logger.warning("dropped a request for a replay that is not in its form")
            return True
        first = int.from_bytes(rest[1], "big")
        batches = [(number, batch) for number, batch in self._buffer if number >= first]
        if self._buffer and first < self._buffer[0][0]:
            batches = [self._make_whole(all_events)]
        for number, batch in batches:
            reply = (client, b"", self._topic, number.to_bytes(8, "big"), batch)
            self.replay_socket.send_multipart(reply, copy=False)
        self.replay_socket.send_multipart((client, b"", b"", _END, b""))
        return True

    def _make_whole(self, all_events: Callable[[], list[Event]]) -> tuple[int, bytes]:
        """The batch that makes up for all, with its number; packed once for all who ask for it."""
        number = self._next - 1
        if self._whole is None or self._whole[0] != number:
            self._whole = number, pack(all_events())
        return self._whole

    def close(self) -> None:
        """Close the sockets; batches that wait are lost."""
        self._pub.close()
        if self.replay_socket is not None:
            self.replay_socket.close()


def pack(events: list[Event]) -> bytes:
    """A batch, which is packed now."""
    packed: bytes = msgpack.packb([time.time(), events, _RANK])
    return packed


def _bind(kind: int, endpoint: str, high_water: int) -> Any:
    socket: Any = zmq.Context.instance().socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, high_water)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
    socket.setsockopt(zmq.IPV6, "[" in endpoint)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(
            f"cannot listen for readers of KV events at {endpoint}: {error}"
        ) from None
    return socket
