"""Tokens per second beside busy processes: python benchmark/micro/busy_neighbour.py [--quick].

Servers of the benchmarks' model with different --num-threads take turns on W1 and W3 (see
benchmark/workloads.py), quiet and beside one and two processes that spin at nice 0 without being
pinned. --before FOLDER adds the server of another checkout. --results FILE writes the report.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path

BENCHMARK = Path(__file__).parent.parent
sys.path.insert(0, str(BENCHMARK))

from model import make_model  # noqa: E402
from serving import measure, served  # noqa: E402
from workloads import Workload, make_workload, output_tokens  # noqa: E402

CACHE = Path.home() / ".cache" / "minisrv-bench" / "tiny"
TARGETS = {"W1": 0.6, "W3": 0.5}  # of the quiet rate, beside one busy process
SETTLE_S = 0.5


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes that spin until the end of the block."""
    spin = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(spin) for _ in range(count)]
    try:
        time.sleep(SETTLE_S)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def rates(urls: dict[str, str], name: str, repetitions: int) -> dict[tuple[str, int], float]:
    """Median tokens per second of each server beside 0, 1 and 2 busy processes."""
    found: dict[tuple[str, int], list[float]] = {}
    for repetition in range(repetitions):
        for num_busy in (0, 1, 2):
            with busy_processes(num_busy):
                servers = list(urls.items())
                for server, url in servers if repetition % 2 else reversed(servers):
                    workload = make_workload(name, 3 * repetition + num_busy)
                    rate = output_tokens(workload) / measure(url, workload).wall
                    found.setdefault((server, num_busy), []).append(rate)
    return {key: statistics.median(values) for key, values in found.items()}


def report(urls: dict[str, str], repetitions: int) -> str:
    """The table, with the share of the quiet rate in parentheses."""
    lines = [
        "| workload | server | quiet, tok/s | 1 busy process | 2 busy processes |",
        "|---|---|---|---|---|",
    ]
    for name, target in TARGETS.items():
        found = rates(urls, name, repetitions)
        for server in urls:
            quiet = found[server, 0]
            cells = [f"{found[server, k]:.0f} ({found[server, k] / quiet:.2f})" for k in (1, 2)]
            lines.append(f"| {name} | {server} | {quiet:.0f} | {cells[0]} | {cells[1]} |")
        lines.append(f"| {name} | target | | {target} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    parser.add_argument("--quick", action="store_true", help="one repetition instead of five")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    model, cores = make_model(CACHE), len(os.sched_getaffinity(0))
    warm_up: Workload = [(list(range(2000, 2064)), 8)] * 16
    with ExitStack() as stack:
        urls = {
            f"--num-threads {threads}": stack.enter_context(served(model, threads))
            for threads in dict.fromkeys((cores, 1, 2 * cores))
        }
        if args.before is not None:
            environment = {"PYTHONPATH": str(args.before / "python")}
            server = served(model, cores, environment)
            urls["before"] = stack.enter_context(server)
        for url in urls.values():
            measure(url, warm_up)
        repetitions = 1 if args.quick else 5
        table = report(urls, repetitions)
    text = (
        f"# Beside busy processes, {cores} cores, {date.today()}\n\n"
        f"`python benchmark/micro/busy_neighbour.py`, medians of {repetitions}: Python "
        f"{platform.python_version()}, torch {version('torch')}.\n\n{table}\n"
    )
    print(text)
    if args.results is not None:
        args.results.write_text(text)


if __name__ == "__main__":
    main()
