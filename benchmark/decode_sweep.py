"""Decode steps on a CPU by context and number of streams: python benchmark/decode_sweep.py MODEL.

MODEL is the folder of a checkpoint or a GGUF file. The time of a step should grow as the bytes that
it reads do: the weights once, and keys and values of all streams. The engine runs in this process,
and its cache is filled with a constant instead of computed. --results PAGE writes the table, and
beside it a picture.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
import torch

from gguf_files import measure_file
from minisrv.checkpoint.model_config import load_model_config
from minisrv.config import ServerConfig
from minisrv.engine.engine import Engine
from minisrv.engine.forward_batch import ForwardBatch, SamplingColumns
from minisrv.engine.model_size import count_parameters, kv_bytes_per_token
from minisrv.engine.parallel.shard import Sharding
from roofline import ITEMSIZE, measure_read_bandwidth
from run import describe_cpu

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 420, 60, 50, 20, 130
COLORS = ("#c0392b", "#2471a3", "#1e8449", "#b9770e", "#6c3483", "#17202a")


@dataclass(frozen=True, slots=True)
class Point:
    """A decode step of `streams` sequences with `context` tokens each; seconds: the median."""

    streams: int
    context: int
    num_bytes: int
    seconds: float


class Sweep:
    """An engine and the bytes that its steps read."""

    def __init__(self, model: Path, most_streams: int, longest: int, threads: int) -> None:
        model_config = load_model_config(model, longest)
        config = ServerConfig(
            model=str(model), device="cpu", max_running_requests=most_streams, num_threads=threads
        )
        self._engine = Engine(config, model, model_config)
        self._kv_bytes = kv_bytes_per_token(model_config, ITEMSIZE, Sharding())
        if model.is_file():
            self._weight_bytes = measure_file(model).step_bytes
        else:
            parameters = count_parameters(model_config)
            dense = parameters.matrices + parameters.head_products + parameters.vectors
            self._weight_bytes = dense * ITEMSIZE
        self.num_tokens = self._engine.num_pages * self._engine.page_size
        pool = self._engine._rank_0._pool
        for keys_and_values in pool.pages:
            for pages in keys_and_values:
                pages.fill_(0.5)  # memory that was never written is not read from memory

    def measure(self, streams: int, context: int, steps: int) -> Point:
        """The time of one decode step."""
        batch, seconds = self._batch(streams, context), []
        for _ in range(steps + 1):
            began = time.perf_counter()
            self._engine.wait(self._engine.launch(batch))
            seconds.append(time.perf_counter() - began)
        num_bytes = self._weight_bytes + streams * context * self._kv_bytes
        return Point(streams, context, num_bytes, median(seconds[1:]))

    def _batch(self, streams: int, context: int) -> ForwardBatch:
        columns = -(-context // self._engine.page_size)
        rows, none = np.arange(streams, dtype=np.int32), np.empty(0, np.int32)
        zeros, ones = np.zeros(streams, np.float32), np.ones(streams, np.float32)
        return ForwardBatch(
            step_id=0,
            num_decodes=streams,
            rows=rows,
            query_lens=np.ones(streams, np.int32),
            start_positions=np.full(streams, context - 1, np.int32),
            prefill_ids=none,
            page_rows=np.repeat(rows, columns),
            page_columns=np.tile(np.arange(columns, dtype=np.int32), streams),
            page_ids=np.arange(streams * columns, dtype=np.int32),
            sample_indices=rows,
            sampling=SamplingColumns(
                temperature=zeros,
                top_p=ones,
                top_k=zeros.astype(np.int32),
                min_p=zeros,
                seeds=zeros.astype(np.int64),
                choices=zeros.astype(np.int32),
                suppress_samples=none,
                suppress_ids=none,
            ),
        )


def measure_all(sweep: Sweep, args: argparse.Namespace) -> Iterator[Point]:
    """All points for which the cache has room."""
    for streams in args.streams:
        for context in args.contexts:
            if streams * context <= sweep.num_tokens:
                yield sweep.measure(streams, context, args.steps)


def draw(points: Sequence[Point], bandwidth: float) -> str:
    """The picture as SVG: milliseconds over bytes, and a line at the machine's bandwidth."""
    most_bytes = max(point.num_bytes for point in points) * 1.05
    longest = max(point.seconds for point in points) * 1.1

    def at(num_bytes: float, seconds: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * num_bytes / most_bytes
        return f"{x:.1f},{HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * seconds / longest:.1f}"

    end = min(most_bytes, longest * bandwidth)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<polyline points="{at(0, longest)} {at(0, 0)} {at(most_bytes, 0)}" fill="none" '
        'stroke="#999"/>',
        f'<polyline points="{at(0, 0)} {at(end, end / bandwidth)}" stroke="#999" '
        'stroke-dasharray="4 4"/>',
        _text(LEFT, 14, f"ms per step, up to {longest * 1e3:.0f}"),
        _text(LEFT, HEIGHT - 30, "0"),
        _text(LEFT + 120, HEIGHT - 12, f"GB read per step, up to {most_bytes / 1e9:.1f}; dashed: "),
        _text(LEFT + 320, HEIGHT - 12, f"a read loop, {bandwidth / 1e9:.1f} GB/s"),
    ]
    for number, streams in enumerate(dict.fromkeys(point.streams for point in points)):
        color = COLORS[number % len(COLORS)]
        places = [at(one.num_bytes, one.seconds) for one in points if one.streams == streams]
        parts.append(f'<polyline points="{" ".join(places)}" fill="none" stroke="{color}"/>')
        for x, y in (place.split(",") for place in places):
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>')
        name = f"{streams} stream{'s' * (streams > 1)}"
        parts.append(_text(WIDTH - RIGHT + 8, TOP + 16 * (number + 1), name, color))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, color: str = "black") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{color}">{text}</text>'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, metavar="PAGE", help="file to write the page to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bandwidth = measure_read_bandwidth()
    longest = max(args.contexts) + 1
    sweep = Sweep(args.model, max(args.streams), longest, args.threads)
    points = []
    lines = [
        "| streams | context | ms per step | tok/s | GB read | GB/s | share |",
        "|---" * 7 + "|",
    ]
    print("\n".join(lines))
    for point in measure_all(sweep, args):
        points.append(point)
        rate = point.num_bytes / point.seconds
        lines.append(
            f"| {point.streams} | {point.context} | {point.seconds * 1e3:.1f} "
            f"| {point.streams / point.seconds:.1f} | {point.num_bytes / 1e9:.2f} "
            f"| {rate / 1e9:.1f} | {rate / bandwidth:.2f} |"
        )
        print(lines[-1], flush=True)
    if args.results:
        picture = args.results.with_suffix(".svg")
        picture.write_text(draw(points, bandwidth))
        args.results.write_text(
            f"# Decode steps of {args.model.name} on a CPU, {date.today()}\n\n"
            f"`python {' '.join(sys.argv)}`\n\n{describe_cpu()}, {args.threads} threads, medians "
            f"of {args.steps}. Share: of a plain read loop's {bandwidth / 1e9:.1f} GB/s.\n\n"
            + "\n".join(lines)
            + f"\n\n![ms per step over GB read]({picture.name})\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
