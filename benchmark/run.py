"""minisrv over HTTP and transformers, with the same model, threads and workloads, in one run.

python benchmark/run.py [--quick] [--results FILE]. The two never run at the same time: for each
repetition of a workload first one, then the other.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

from model import make_model
from serving import Timing, measure, served
from transformers_peer import TransformersPeer
from workloads import Workload, make_workload, output_tokens

TARGETS = {"W1": 1.3, "W3": 2.5, "W4": 8.0}
CACHE = Path.home() / ".cache" / "minisrv-bench" / "tiny"


@dataclass
class Row:
    """Both engines on one workload; tokens per second count only the tokens asked for."""

    name: str
    ours: list[Timing] = field(default_factory=list)
    theirs: list[Timing] = field(default_factory=list)
    tokens: int = 0

    @property
    def ratio(self) -> float:
        """How many times faster minisrv is, by median wall times."""
        return self._wall(self.theirs) / self._wall(self.ours)

    def line(self) -> str:
        """The row of the table."""
        walls, their_walls = self._wall(self.ours), self._wall(self.theirs)
        ratios = sorted(t.wall / o.wall for o, t in zip(self.ours, self.theirs, strict=True))
        ttft = statistics.median(t.ttft for t in self.ours) * 1e3
        itl = statistics.median(t.itl for t in self.ours) * 1e3
        met = "met" if self.ratio >= TARGETS[self.name] else "missed"
        return (
            f"| {self.name} | {self.tokens / walls:.0f} | {self.tokens / their_walls:.0f} "
            f"| {self.ratio:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) "
            f"| {TARGETS[self.name]:g}, {met} | {ttft:.0f} | {itl:.1f} "
            f"| {walls:.2f} | {their_walls:.2f} |"
        )

    @staticmethod
    def _wall(timings: list[Timing]) -> float:
        return statistics.median(t.wall for t in timings)


PEERS = """\
Other engines on a similar machine with a similar model, measured on another day and quoted only for
comparison: decode of one stream 155 tok/s (vLLM, over HTTP), 369 (OpenVINO GenAI, in process), 416
(llama.cpp, over HTTP); W3 885, 1659 and 372 tok/s; W4 cold 0.56, 1.56 and 5.72 s.
"""
HEADER = (
    "| workload | minisrv tok/s | transformers tok/s | ratio of medians (range) | target "
    "| TTFT ms | ITL ms | wall s | transformers wall s |\n|---|---|---|---|---|---|---|---|---|"
)


def run(url: str, peer: TransformersPeer, repetitions: int) -> list[Row]:
    """Warm up both engines, then measure them in turn."""
    warm_up: Workload = [(list(range(2000, 2064)), 8)] * 16
    measure(url, warm_up)
    peer.measure(warm_up)
    rows = []
    for name in TARGETS:
        row = Row(name)
        for repetition in range(repetitions):
            workload = make_workload(name, repetition)
            row.tokens = output_tokens(workload)
            row.ours.append(measure(url, workload))
            row.theirs.append(peer.measure(workload))
        rows.append(row)
        print(row.line(), flush=True)
    return rows


def report(rows: list[Row], threads: int, repetitions: int) -> str:
    """The Markdown page for benchmark/results."""
    packages = ("minisrv", "torch", "transformers", "numpy", "pyzmq", "uvicorn")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    table = "\n".join([HEADER, *(row.line() for row in rows)])
    return (
        f"# tiny on CPU, {date.today()}\n\n"
        f"`make bench`: {__doc__.splitlines()[0]}\n\n"
        f"{describe_cpu()}, {threads} threads each, bfloat16, medians of {repetitions}. "
        f"Python {platform.python_version()}, {versions}.\n\n"
        "The model has 14.5 M random weights. W1 is one request (128 tokens in, 128 out), W3 is 16 "
        "requests at once (100-300 in, 50-150 out), W4 is 16 requests at once with a shared "
        "1,024-token prefix (32 unique prompt tokens and 32 out each) and a cold cache. "
        "transformers gets W3 and W4 as one static batch; its tokens per second count only the "
        "tokens asked for, not those computed because another sequence is longer.\n\n"
        f"{table}\n\n{PEERS}"
    )


def describe_cpu() -> str:
    """The number of cores and their name."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(": ")[1]
        for line in (info.read_text() if info.exists() else "").splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} cores of {names[0]}" if names else platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repetition; write no page")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--model-dir", type=Path, default=CACHE)
    parser.add_argument("--results", type=Path, help="file to write the page to")
    args = parser.parse_args()
    repetitions = 1 if args.quick else args.repetitions
    model_dir = make_model(args.model_dir)
    peer = TransformersPeer(model_dir, args.threads)
    print(HEADER)
    with served(model_dir, args.threads) as url:
        rows = run(url, peer, repetitions)
    if not args.quick:
        results = Path(__file__).parent / "results"
        path = args.results or results / f"tiny_cpu_{date.today()}.md"
        path.write_text(report(rows, args.threads, repetitions))
        print(f"written to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
