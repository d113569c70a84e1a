"""minisrv and other engines over HTTP on a CPU, on the same model files, in one run.

python benchmark/peers.py [FILE ...] [--llama-server PATH] [--openvino-python PATH] [--vllm PATH]
                          [--results PAGE]

FILE is a GGUF file (gguf_files.py makes some) or the folder of a checkpoint, which llama.cpp gets
as GGUF in bfloat16; by default it is the 0.6B shape in bfloat16. For each file the servers run side
by side. They get each workload in turn, in alternating order, while the others are idle.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from gguf_files import CACHE, SHAPE, FileSize, make_gguf, measure_file
from minisrv.checkpoint.model_config import ModelConfig, load_model_config
from model import make_model
from roofline import ITEMSIZE, Rates, decode_step, ideal, measure_rates, measure_read_bandwidth
from run import describe_cpu
from serving import Timing, measure, served, wait_ready
from workloads import Workload, make_workload, output_tokens

REPETITIONS = {"W1": 5, "W2": 5, "W3": 3, "W4": 3}
DECODE = "W1 decode"  # the rate of W1 between its first and its last token
WARM_UP: Workload = [(list(range(2000, 2064)), 8)] * 16
LLAMA_FLAGS = "--parallel 16 --ctx-size 32768 --batch-size 2048 --ubatch-size 512 --flash-attn on"
HOW = """\
W1: one request, 128 tokens in, 128 out. W2: one request, 1,024 in, 1 out. W3: 16 requests at once,
100-300 in, 50-150 out. W4: 16 requests at once that share 1,024 tokens, 32 more in and 32 out each;
"W4 warm" is the same again with other own tokens. Cells: output tokens per second (W2: prompt
tokens; "W1 decode": between the first token and the last), from the median time, with the range.
Ratio: minisrv's rate divided by the other engine's, of the medians, with the range of the pairs.
Share: of what the machine could do, prompts and then decode steps at the rates above; the shared
tokens of W4 count once, those of "W4 warm" not at all.
"""


@dataclass
class Results:
    """What was measured on one file: seconds by row of the table and engine."""

    name: str
    size: FileSize | None
    start_s: dict[str, float]
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, row: str, engine: str, seconds: float) -> None:
        """One repetition."""
        self.seconds.setdefault(row, {}).setdefault(engine, []).append(seconds)


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


def vllm(program: str, model: Path, threads: int) -> AbstractContextManager[str]:
    """vLLM's server."""
    command = [program, "serve", str(model), "--port", "{port}", "--served-model-name", "bench"]
    command += ["--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "16"]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    environment = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": cores}
    return running(command, environment, CACHE.parent / "vllm.log")


def llama_cpp(program: str, flags: str, file: Path, threads: int) -> AbstractContextManager[str]:
    """llama.cpp's server."""
    command = [program, "--model", str(file), "--port", "{port}", "--alias", "bench"]
    command += ["--threads", str(threads), *shlex.split(flags)]
    return running(command, {}, CACHE.parent / "llama.cpp.log")


def openvino(python: str, file: Path, threads: int) -> AbstractContextManager[str]:
    """OpenVINO GenAI behind our server for it."""
    program = Path(__file__).with_name("openvino_server.py")
    command = [python, str(program), str(file), "--port", "{port}", "--threads", str(threads)]
    return running(command, {}, CACHE.parent / "openvino.log")


def engines(file: Path, args: argparse.Namespace) -> dict[str, AbstractContextManager[str]]:
    """The servers of a file, which start when they are entered."""
    servers = {"minisrv": served(file, args.threads)}
    if args.vllm and file.is_dir():
        servers["vLLM"] = vllm(args.vllm, file, args.threads)
    if args.llama_server:
        own_file = make_gguf(file, "BF16") if file.is_dir() else file
        server = llama_cpp(args.llama_server, args.llama_flags, own_file, args.threads)
        servers["llama.cpp"] = server
    if args.openvino_python and not file.is_dir():
        servers["OpenVINO"] = openvino(args.openvino_python, file, args.threads)
    return servers


def run(file: Path, args: argparse.Namespace) -> Results:
    """Measure all engines on one file."""
    with ExitStack() as stack:
        urls, start_s = {}, {}
        for engine, server in engines(file, args).items():
            began = time.monotonic()
            urls[engine] = stack.enter_context(server)
            start_s[engine] = time.monotonic() - began
        results = Results(file.name, None if file.is_dir() else measure_file(file), start_s)
        for url in urls.values():
            measure(url, WARM_UP)
        for name in args.workloads:
            for repetition in range(args.repetitions or REPETITIONS[name]):
                order = list(urls.items())
                for engine, url in order if repetition % 2 == 0 else reversed(order):
                    _measure(results, name, engine, url, repetition)
    return results


def _measure(results: Results, name: str, engine: str, url: str, repetition: int) -> None:
    for part in (name, "W4 warm") if name == "W4" else (name,):
        timing: Timing = measure(url, make_workload(part, repetition))
        results.add(part, engine, timing.wall)
        if name == "W1":
            results.add(DECODE, engine, timing.itl)
        print(results.name, part, engine, f"{timing.wall:.2f} s", file=sys.stderr, flush=True)


def tokens(row: str) -> int:
    """The tokens that a rate counts: of the prompts in W2, else of the outputs."""
    if row == DECODE:
        return 1
    workload = make_workload(row, 0)
    if row == "W2":
        return sum(len(prompt) for prompt, _ in workload)
    return output_tokens(workload)


def limit(row: str, model: ModelConfig, weight_bytes: float, rates: Rates) -> float:
    """Seconds that a row's workload takes at best; of W1 decode, one token."""
    if row == DECODE:
        return sum(decode_step(model, 1, 128 + 64, rates, weight_bytes))
    lengths = [(len(prompt), count) for prompt, count in make_workload(row, 0)]
    if row.startswith("W4"):
        shared = 0 if row == "W4 warm" else 1024
        lengths = [(prompt - 1024, count) for prompt, count in lengths]
        lengths[0] = (lengths[0][0] + shared, lengths[0][1])
    return ideal(model, lengths, rates, weight_bytes).seconds


def table(results: Results, model: ModelConfig, rates: Rates) -> str:
    """The results of one file: a headline, what it holds, and a row for each workload."""
    peers = [engine for engine in results.start_s if engine != "minisrv"]
    size = results.size
    weight_bytes = ITEMSIZE if size is None else size.step_bytes / size.num_weights
    head = ["workload", "minisrv", *(cell for peer in peers for cell in (peer, "ratio")), "share"]
    lines = [f"## {results.name}\n"]
    if size is not None:
        lines.append(f"{size}.\n")
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row, seconds in results.seconds.items():
        ours, count = seconds["minisrv"], tokens(row)
        cells = [row, _rates(ours, count)]
        for peer in peers:
            cells += [_rates(seconds[peer], count), _ratio(seconds[peer], ours)]
        share = limit(row, model, weight_bytes, rates) / statistics.median(ours)
        lines.append("| " + " | ".join([*cells, f"{share:.2f}"]) + " |")
    if size is not None and DECODE in results.seconds:
        read = {
            engine: size.step_bytes / statistics.median(times)
            for engine, times in results.seconds[DECODE].items()
        }
        parts = (f"{engine} {rate / 1e9:.1f}" for engine, rate in read.items())
        lines.append(f"\nWeights read in W1 decode, GB/s: {', '.join(parts)}.")
    starts = (f"{engine} {seconds:.1f}" for engine, seconds in results.start_s.items())
    return "\n".join([*lines, f"\nSeconds until ready: {', '.join(starts)}.\n"])


def _rates(seconds: Sequence[float], count: int) -> str:
    rates = sorted(count / second for second in seconds)
    return f"{count / statistics.median(seconds):.1f} ({rates[0]:.1f}-{rates[-1]:.1f})"


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> str:
    pairs = sorted(their / our for their, our in zip(theirs, ours, strict=True))
    median = statistics.median(theirs) / statistics.median(ours)
    return f"**{median:.2f}** ({pairs[0]:.2f}-{pairs[-1]:.2f})"


def page(
    results: Sequence[Results],
    model: ModelConfig,
    rates: Rates,
    copy: float,
    args: argparse.Namespace,
) -> str:
    """The Markdown page for benchmark/results. copy: bytes per second."""
    repetitions = args.repetitions or ", ".join(f"{k} {v}" for k, v in REPETITIONS.items())
    versions = [f"minisrv {version('minisrv')}", f"torch {version('torch')}"]
    versions.append(f"Python {platform.python_version()}")
    if args.llama_server:
        versions.append(f"llama.cpp {_llama_version(args.llama_server)} with `{args.llama_flags}`")
    if args.openvino_python:
        asked = "from importlib.metadata import version; print(version('openvino-genai'))"
        (found,) = _output([args.openvino_python, "-c", asked])
        versions.append(f"OpenVINO GenAI {found} with openvino_server.py")
    if args.vllm:
        versions.append(f"vLLM {_output([args.vllm, '--version'])[-1]}")
    return "\n".join(
        [
            f"# Beside other engines on a CPU, {date.today()}\n",
            f"`python {' '.join(sys.argv)}`: {__doc__.splitlines()[0]}\n",
            f"{describe_cpu()}, {args.threads} threads each, medians of {repetitions}. Before the "
            f"servers started, a plain read loop read {rates.bandwidth / 1e9:.1f} GB/s, a copy "
            f"moved {copy / 1e9:.1f} GB/s, and torch multiplied matrices at "
            f"{rates.flops / 1e9:.0f} GFLOP/s. {', '.join(versions)}.\n",
            HOW,
            *(table(one, model, rates) for one in results),
        ]
    )


def _llama_version(program: str) -> str:
    lines = _output([program, "--version"])
    return next(line.removeprefix("version: ") for line in lines if line.startswith("version: "))


def _output(command: list[str]) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--vllm", help="the program vllm, from the package vllm-cpu")
    parser.add_argument("--llama-server", help="llama.cpp's server")
    parser.add_argument("--openvino-python", help="a Python that has openvino-genai")
    parser.add_argument("--llama-flags", default=LLAMA_FLAGS, help=f"default: {LLAMA_FLAGS}")
    parser.add_argument(
        "--workloads", nargs="+", choices=REPETITIONS, default=list(REPETITIONS), metavar="W"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, help="for all workloads")
    parser.add_argument(
        "--shape", type=Path, default=SHAPE, help="folder with the config.json of the files"
    )
    parser.add_argument("--results", type=Path, metavar="PAGE", help="file to write the page to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    files = args.files or [make_model(CACHE, SHAPE)]
    model = load_model_config(args.shape)
    measured = measure_rates(torch.device("cpu"))
    rates = replace(measured, bandwidth=measure_read_bandwidth())
    results = []
    for file in files:
        results.append(run(file, args))
        text = page(results, model, rates, measured.bandwidth, args)
        if args.results:  # after each file, so that an interrupted run leaves its results
            args.results.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
