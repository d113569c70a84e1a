"""What KV events cost the scheduler: python benchmark/micro/kv_events.py [--results FILE].

The loop of host_step.py over an engine whose steps take 10 ms, as on a device, with a publisher in
a process of its own. Times are CPU time of the scheduler's thread. The calls for events are timed
one by one, less what timing a call that does nothing shows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from host_step import Clients, FrameChannel, StubEngine, make_loop

from minisrv.engine.forward_batch import ForwardBatch, ForwardOutput
from minisrv.kvcache.tree_changes import TreeChanges
from minisrv.scheduler.tree_feed import TreeFeed
from minisrv.wire.sockets import Epoch, Outbox

STEP_S = 0.01
WARM_UP_STEPS = 300
TARGET = 0.02
PUBLISHER = """
import sys
from pathlib import Path
from minisrv.kv_events.blocks import CachedBlocks
from minisrv.kv_events.publisher import Publisher
from minisrv.wire.messages import KV_EVENTS_INBOX
from minisrv.wire.sockets import Epoch, Inbox

directory = sys.argv[1]
inbox = Inbox(Path(directory), "kv_events", KV_EVENTS_INBOX, Epoch(0))
publisher = Publisher(f"ipc://{directory}/events", f"ipc://{directory}/replay", "", 10_000)
blocks = CachedBlocks(16)
print("ready", flush=True)
while True:
    inbox.wait()
    for message in inbox.drain():
        publisher.publish(blocks.apply(message))
"""


class PacedEngine(StubEngine):
    """Its steps take STEP_S from launch to the end of wait."""

    def __init__(self, num_rows: int) -> None:
        super().__init__(num_rows)
        self._free_at = 0.0

    def launch(self, batch: ForwardBatch) -> ForwardOutput:
        """See ForwardEngine."""
        self._free_at = max(self._free_at, time.monotonic()) + STEP_S
        return super().launch(batch)

    def wait(self, handle: ForwardOutput) -> ForwardOutput:
        """See ForwardEngine."""
        time.sleep(max(0.0, self._free_at - STEP_S - time.monotonic()))
        return handle


class Stopwatch:
    """The CPU time of wrapped functions in this thread, and how often they are called."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_calls = 0

    def timed(self, function: Callable[..., None]) -> Callable[..., None]:
        """`function`, with its time counted."""

        def call(*args: Any, **options: Any) -> None:
            began = time.thread_time()
            function(*args, **options)
            self.seconds += time.thread_time() - began
            self.num_calls += 1

        return call


def empty_call_s() -> float:
    """What a Stopwatch shows for a call that does nothing."""
    watch = Stopwatch()
    call = watch.timed(lambda: None)
    for _ in range(10_000):
        call()
    return watch.seconds / watch.num_calls


def measure(batch: int, steps: int, directory: Path) -> tuple[float, float]:
    """Microseconds per step: of the whole turn of the loop, and of its calls for events."""
    channel = FrameChannel()
    loop = make_loop(batch, PacedEngine(batch), channel)
    watch = Stopwatch()
    loop.feed = TreeFeed(loop.scheduler.cache.tree, Outbox(directory, "kv_events", Epoch(0)))
    loop.feed.send = watch.timed(loop.feed.send)  # type: ignore[method-assign]
    TreeChanges.store = watch.timed(TreeChanges.store)  # type: ignore[method-assign]
    TreeChanges.remove = watch.timed(TreeChanges.remove)  # type: ignore[method-assign]
    clients, seconds = Clients(channel, batch), 0.0
    for step in range(-WARM_UP_STEPS, steps):
        clients.send()
        if not step:
            seconds = watch.seconds = watch.num_calls = 0
        began = time.thread_time()
        loop.turn()
        seconds += time.thread_time() - began
        clients.receive()
    timing_s = watch.num_calls * empty_call_s()
    return (seconds - timing_s) / steps * 1e6, (watch.seconds - timing_s) / steps * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-c", PUBLISHER, directory]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as publisher:
            assert publisher.stdout is not None
            publisher.stdout.readline()
            whole, events = measure(args.batch, args.steps, Path(directory))
            publisher.kill()
    met = "met" if events <= TARGET * whole else "missed"
    target = f"{TARGET:.0%}, {met}"
    table = (
        "| batch | step, us | of it for KV events, us | share | target |\n|---|---|---|---|---|\n"
        f"| {args.batch} | {whole:.0f} | {events:.1f} | {events / whole:.1%} | {target} |"
    )
    print(table)
    if args.results:
        args.results.write_text(
            f"# What KV events cost the scheduler, {date.today()}\n\n"
            f"`python benchmark/micro/kv_events.py`: means of {args.steps} steps.\n\n{table}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
