"""How long a server takes until it is ready, and how much memory its engine process has.

python benchmark/start.py [MODEL ...] [--repetitions N] [--kv-memory SIZE] [--results PAGE]

Models are started one after another, in alternating order; by default demo and the 0.6B shape in
Q4_K_M. A file is read once before each start, so that it comes from memory. Seconds are from the
launch to the first 200 of /ready. Before, each is started once more, prompts fill its KV cache, and
the memory of its engine process is taken, at the end of the last and when it has had no work for
some seconds.
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
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil

from gguf_files import CACHE
from minisrv.engine.memory import format_size, parse_size
from minisrv.supervision.idle_memory import PERIOD_S
from run import describe_cpu

MODELS = ("demo", str(CACHE.parent / "Qwen3-0.6B-Q4_K_M.gguf"))
PROMPT_TOKENS = 1000
ENGINE = "minisrv.scheduler"
POLL_S = 0.02
IDLE_S = 3 * PERIOD_S
READ_BYTES = 2**24


@dataclass(frozen=True)
class Memory:
    """Bytes of the engine process, the weights as printed at the start.

    resident, private: without work. at_work: resident when a prompt has just been computed.
    """

    weights: int
    at_work: int
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


def measure_start(model: str, kv_memory: str) -> float:
    """Seconds until a server is ready."""
    if Path(model).is_file():  # some kernels drop what was not read for minutes
        with open(model, "rb", buffering=0) as file:
            while file.read(READ_BYTES):
                pass
    begin = time.perf_counter()
    with launched(model, kv_memory) as (process, url):
        _wait_ready(process, url)
        return time.perf_counter() - begin


def measure_memory(model: str, kv_memory: str) -> Memory:
    """The memory of a server's engine process when the cache is full."""
    with launched(model, kv_memory) as (process, url):
        _wait_ready(process, url)
        assert process.stdout is not None
        line = next(line for line in process.stdout if "weights  " in line)
        printed = re.search(r"weights +(\S+) (\S+)", line)
        assert printed
        _fill_cache(url)
        (engine,) = (
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if ENGINE in child.cmdline()
        )
        at_work = engine.memory_info().rss
        time.sleep(IDLE_S)
        idle = engine.memory_full_info()
    return Memory(parse_size(printed[1] + printed[2]), at_work, idle.rss, idle.uss)


def _wait_ready(process: subprocess.Popen[str], url: str) -> None:
    parts = urlsplit(url)
    while True:
        # A client of httpx takes as much time as the start can spare.
        with suppress(OSError), closing(HTTPConnection(str(parts.hostname), parts.port)) as one:
            one.request("GET", "/ready")
            if one.getresponse().status == 200:
                return
        assert process.poll() is None, "the server ended"
        time.sleep(POLL_S)


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


def page(seconds: dict[str, list[float]], memory: dict[str, Memory], kv_memory: str) -> str:
    """The results in Markdown."""
    cache = parse_size(kv_memory)
    lines = [
        f"# Start and memory on a CPU, {date.today()}",
        "",
        f"`python benchmark/start.py`: {describe_cpu()}; minisrv {version('minisrv')}, "
        f"torch {version('torch')}.",
        f"Medians with the range. A KV cache of {kv_memory}, filled by prompts of {PROMPT_TOKENS} "
        f"tokens. Memory {IDLE_S:g} s after the last of them, and at its end. Rest: resident "
        "memory less weights and cache.",
        "",
        "| model | seconds until ready | weights | resident | private | rest | rest at work |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, times in seconds.items():
        of_engine = memory[model]
        sizes = of_engine.weights, of_engine.resident, of_engine.private
        counted = of_engine.weights + cache
        cells = [
            Path(model).name,
            f"{statistics.median(times):.1f} ({min(times):.1f}-{max(times):.1f})",
            *map(format_size, sizes),
            format_size(of_engine.resident - counted),
            format_size(of_engine.at_work - counted),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--kv-memory", default="256MiB", metavar="SIZE")
    parser.add_argument("--results", type=Path, metavar="PAGE", help="file to write the page to")
    args = parser.parse_args()
    memory = {model: measure_memory(model, args.kv_memory) for model in args.models}
    seconds: dict[str, list[float]] = {model: [] for model in args.models}
    for number in range(args.repetitions):
        for model in args.models if number % 2 else reversed(args.models):
            seconds[model].append(measure_start(model, args.kv_memory))
    text = page(seconds, memory, args.kv_memory)
    print(text)
    if args.results:
        args.results.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
