"""Well-behaved streams beside a fuzz, in a process of their own: only the server can delay them.

`python -m tests.soak.good_streams URL MODEL_DIR` streams until its input ends, and then prints what
it saw as JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import uvloop

from tests.soak.hash_texts import RequestMaker, WrongReply
from tests.soak.raw_http import BrokenReply, Connection, json_request

NUM_STREAMS = 8


@dataclass
class Seen:
    """gaps are between two parts of one stream, and waits before its first part, in seconds."""

    num_streams: int = 0
    num_parts: int = 0
    longest_gap_s: float = 0
    longest_wait_s: float = 0
    gaps_over_s: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("0.05", "0.25", "1"), 0)
    )
    differences: list[str] = field(default_factory=list)

    def add_gap(self, seconds: float) -> None:
        self.longest_gap_s = max(self.longest_gap_s, seconds)
        for bound in self.gaps_over_s:
            self.gaps_over_s[bound] += seconds > float(bound)


async def stream_until(ended: asyncio.Event, address: tuple[str, int], model_dir: Path) -> Seen:
    """Keep NUM_STREAMS streams open until `ended`, and check their texts."""
    seen, maker = Seen(), RequestMaker(model_dir)

    async def client(number: int) -> None:
        rng = random.Random(number)
        while not ended.is_set():
            try:
                await _stream(address, maker, rng, seen)
            except (BrokenReply, WrongReply, OSError) as error:
                seen.differences.append(f"{type(error).__name__}: {error}")

    await asyncio.gather(*(client(number) for number in range(NUM_STREAMS)))
    return seen


async def _stream(
    address: tuple[str, int], maker: RequestMaker, rng: random.Random, seen: Seen
) -> None:
    request = maker.make(rng, stream=True, max_tokens=(40, 120), chats=False, ignore_eos=True)
    connection = await Connection.open(*address)
    try:
        before = time.monotonic()
        await connection.send(json_request(request.path, request.body))
        reply = await connection.read_head()
        seen.longest_wait_s = max(seen.longest_wait_s, time.monotonic() - before)
        before = time.monotonic()
        async for _ in connection.chunks(reply):
            now = time.monotonic()
            seen.add_gap(now - before)
            before = now
            seen.num_parts += 1
        request.check(reply)
        seen.num_streams += 1
    finally:
        connection.close()


async def main(url: str, model_dir: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    seen = await stream_until(ended, (host, int(port)), Path(model_dir))
    print(json.dumps(asdict(seen)))


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
