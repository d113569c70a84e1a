"""minisrv, vLLM and llama.cpp over HTTP on a CPU: the 0.6B shape in bfloat16, in one run.

python benchmark/peers.py [--vllm PATH] [--llama-server PATH] [--results FILE]. The servers run side
by side and get each workload in turn; the others are idle meanwhile.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from http_client import measure, served, wait_ready
from minisrv.checkpoint.model_config import load_model_config
from model import make_model, write_gguf
from roofline import Rates, ideal, measure_rates
from run import describe_cpu
from workloads import Workload, make_workload, output_tokens

SHAPE = Path(__file__).parent / "models" / "Qwen3-0.6B"
CACHE = Path.home() / ".cache" / "minisrv-bench" / "Qwen3-0.6B"
NAMES = ("W1", "W2", "W3", "W4")
HOW = """\
Each cell: output tokens per second (W2: prompt tokens per second), then the ratio of minisrv's rate
to this engine's. The last column is minisrv's share of what the machine could do: prompts, then
decode steps, at the rates of a copy and of a matrix product measured before the servers started;
the shared prefix of W4 counts once, that of "W4 warm" not at all.
"""


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[str]:
    """The URL of a ready server; the command's {port} is a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            [part.format(port=port) for part in command],
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_ready(f"{url}/health", process)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def vllm(program: str, model: Path, threads: int) -> tuple[list[str], dict[str, str]]:
    """The command and environment of vLLM's server."""
    command = [program, "serve", str(model), "--port", "{port}", "--served-model-name", "bench"]
    command += ["--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "16"]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    return command, {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": cores}


def llama_cpp(program: str, model: Path, threads: int) -> tuple[list[str], dict[str, str]]:
    """The command and environment of llama.cpp's server, with 16 slots of 2,048 tokens."""
    command = [program, "--model", str(write_gguf(model)), "--port", "{port}", "--alias", "bench"]
    command += ["--threads", str(threads), "--parallel", "16", "--ctx-size", str(16 * 2048)]
    return command, {}


def tokens(name: str, workload: Workload) -> int:
    """The tokens that a rate counts: of the prompts in W2, else of the outputs."""
    if name == "W2":
        return sum(len(prompt) for prompt, _ in workload)
    return output_tokens(workload)


def limit(name: str, rates: Rates) -> float:
    """Seconds that the workload takes at best."""
    lengths = [(len(prompt), count) for prompt, count in make_workload(name, 0)]
    if name.startswith("W4"):
        shared = 0 if name == "W4 warm" else 1024
        lengths = [(prompt - 1024, count) for prompt, count in lengths]
        lengths[0] = (lengths[0][0] + shared, lengths[0][1])
    return ideal(load_model_config(SHAPE), lengths, rates).seconds


def run(urls: dict[str, str], names: list[str], repetitions: int, rates: Rates) -> list[str]:
    """Measure the workloads; returns the rows of the table."""
    for url in urls.values():
        measure(url, [(list(range(2000, 2064)), 8)] * 16)
    walls: dict[str, dict[str, list[float]]] = {}
    for name in names:
        for repetition in range(repetitions):
            for engine, url in urls.items():
                if engine == "llama.cpp" and name == "W4":
                    continue  # it shares no prefix between running requests; takes minutes
                for part in (name, "W4 warm") if name == "W4" else (name,):
                    timing = measure(url, make_workload(part, repetition))
                    walls.setdefault(part, {}).setdefault(engine, []).append(timing.wall)
                    print(part, engine, f"{timing.wall:.2f} s", file=sys.stderr, flush=True)
    rows = []
    for name in walls:
        median = {engine: statistics.median(times) for engine, times in walls[name].items()}
        count, ours = tokens(name, make_workload(name, 0)), median["minisrv"]
        cells = [f"{count / ours:.1f}"]
        for engine in list(urls)[1:]:
            theirs = median.get(engine)
            cells.append(f"{count / theirs:.1f} ({theirs / ours:.2f})" if theirs else "not run")
        spread = f"{min(walls[name]['minisrv']):.2f}-{max(walls[name]['minisrv']):.2f} s"
        cells += [spread, f"{limit(name, rates) / ours:.2f}"]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", help="the program vllm, from the package vllm-cpu")
    parser.add_argument("--llama-server", help="llama.cpp's server")
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--model-dir", type=Path, default=CACHE)
    parser.add_argument("--results", type=Path, help="file to write the page to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = make_model(args.model_dir, SHAPE)
    rates = measure_rates(torch.device("cpu"))
    servers = {}
    if args.vllm:
        servers["vLLM"] = vllm(args.vllm, model, args.threads)
    if args.llama_server:
        servers["llama.cpp"] = llama_cpp(args.llama_server, model, args.threads)
    with ExitStack() as stack:
        urls = {"minisrv": stack.enter_context(served(model, args.threads))}
        for name, (command, environment) in servers.items():
            log = model / f"{name}.log"
            urls[name] = stack.enter_context(running(command, environment, log))
        rows = run(urls, args.workloads, args.repetitions, rates)
    header = "| workload | " + " | ".join([*urls, "minisrv's walls", "share of the limit"]) + " |"
    table = "\n".join([header, "|---" * (len(urls) + 3) + "|", *rows])
    page = (
        f"# The 0.6B shape on a CPU, {date.today()}\n\n`python {' '.join(sys.argv)}`: "
        f"{__doc__.splitlines()[0]}\n\n{describe_cpu()}, {args.threads} threads each, medians of "
        f"{args.repetitions}. {rates}. Python {platform.python_version()}, "
        f"minisrv {version('minisrv')}, torch {version('torch')}.\n\n{HOW}\n{table}\n"
    )
    print(page)
    if args.results:
        args.results.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
