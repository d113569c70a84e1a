"""How long a server takes until it is ready, and how much memory its engine process has.

python benchmark/start.py [MODEL ...] [--repetitions N] [--kv-memory SIZE] [--results PAGE]

Models are started one after another, in alternating order, from a warm disk; by default demo and
the 0.6B shape in Q4_K_M. Seconds are from the launch to the first 200 of /ready. Then prompts fill
the KV cache, and the resident memory of the engine process is taken.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import httpx
import psutil

from gguf_files import CACHE
from minisrv.engine.memory import format_size, parse_size
from run import describe_cpu

MODELS = ("demo", str(CACHE.parent / "Qwen3-0.6B-Q4_K_M.gguf"))
PROMPT_TOKENS = 1000
ENGINE = "minisrv.scheduler"
POLL_S = 0.02
MIB = 2**20


@dataclass(frozen=True)
class Start:
    """One start: seconds until it was ready, and bytes when the cache was full."""

    seconds: float
    weights: int  # as printed at the start
    resident: int
    private: int


@contextmanager
def launched(model: str, kv_memory: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that starts to serve, and its URL."""
    command = [sys.executable, "-m", "minisrv.launch_server", "--model", model, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--kv-memory", kv_memory], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+?(?=,)", process.stdout.readline())
        assert found
        yield process, found[0]
    finally:
        process.terminate()
        process.communicate(timeout=60)


def measure_start(model: str, kv_memory: str) -> Start:
    """Start a server, fill its cache, and end it."""
    begin = time.perf_counter()
    with launched(model, kv_memory) as (process, url):
        while not _is_ready(url):
            assert process.poll() is None, "the server ended"
            time.sleep(POLL_S)
        seconds = time.perf_counter() - begin
        assert process.stdout is not None
        weights = next(line for line in process.stdout if "weights  " in line)
        printed = re.search(r"weights +(\S+ \S+)", weights)
        assert printed
        _fill_cache(url)
        (engine,) = (
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if ENGINE in child.cmdline()
        )
        memory = engine.memory_full_info()
    return Start(seconds, parse_size(printed[1].replace(" ", "")), memory.rss, memory.uss)


def _is_ready(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    return False


def _fill_cache(url: str) -> None:
    while "max_total_num_tokens" not in (load := httpx.get(f"{url}/v1/loads").json()["loads"][0]):
        time.sleep(POLL_S)  # the scheduler has not reported yet
    rng = random.Random(0)
    capacity = load["max_total_num_tokens"]
    length = min(PROMPT_TOKENS, capacity // 2)
    for _ in range(capacity // length + 1):
        prompt = [rng.randrange(300) for _ in range(length)]
        body = {"prompt": prompt, "max_tokens": 2}
        httpx.post(f"{url}/v1/completions", json=body, timeout=300).raise_for_status()


def page(starts: dict[str, list[Start]], kv_memory: str) -> str:
    """The results in Markdown."""
    cache = parse_size(kv_memory)
    lines = [
        f"# Start and memory on a CPU, {date.today()}",
        "",
        f"`python benchmark/start.py`: {describe_cpu()}; minisrv {version('minisrv')}, "
        f"torch {version('torch')}.",
        f"Medians, with the range; a KV cache of {kv_memory}, filled by prompts of "
        f"{PROMPT_TOKENS} tokens. Rest: resident memory less weights and cache.",
        "",
        "| model | seconds until ready | weights | resident | private | rest |",
        "|---|---|---|---|---|---|",
    ]
    for model, of_model in starts.items():
        seconds = [start.seconds for start in of_model]
        resident = int(statistics.median(start.resident for start in of_model))
        private = int(statistics.median(start.private for start in of_model))
        weights = of_model[0].weights
        lines.append(
            f"| {Path(model).name} | {statistics.median(seconds):.1f} ({min(seconds):.1f}-"
            f"{max(seconds):.1f}) | {format_size(weights)} | {format_size(resident)} | "
            f"{format_size(private)} | {format_size(resident - weights - cache)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--kv-memory", default="256MiB", metavar="SIZE")
    parser.add_argument("--results", type=Path, metavar="PAGE", help="file to write the page to")
    args = parser.parse_args()
    starts: dict[str, list[Start]] = {model: [] for model in args.models}
    for number in range(args.repetitions + 1):
        for model in args.models if number % 2 else reversed(args.models):
            start = measure_start(model, args.kv_memory)
            if number:  # before the first one the disk may be cold
                starts[model].append(start)
    text = page(starts, args.kv_memory)
    print(text)
    if args.results:
        args.results.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
