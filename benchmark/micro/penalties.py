"""What penalties cost per step: python benchmark/micro/penalties.py [--results FILE].

Decode steps in which every request has all three penalties, a bias and `--length` tokens of prompt
and output: the adjustment of float32 logits and the counting of the sampled tokens, without the
sampling itself. `start` is the step in which all requests begin. Compiled operators and torch's.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from minisrv.engine.forward_batch import Penalties
from minisrv.engine.kernels.base import Kernels
from minisrv.engine.kernels.cpu import load_cpu_kernels
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.sampling.adjust import LogitAdjuster

VOCAB_SIZE = 151_936
BATCHES = (1, 32, 256)


def make_penalties(batch: int, length: int, begins: bool) -> Penalties:
    """A step of `batch` samples; three quarters of the `length` tokens are the prompt's."""
    rows = np.arange(batch, dtype=np.int32)
    ones = np.ones(batch, np.float32)
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, batch * length, np.int32)
    begun = rows if begins else rows[:0]
    return Penalties(
        samples=rows,
        rows=rows,
        presence=0.5 * ones,
        frequency=0.1 * ones,
        repetition=1.1 * ones,
        begin_rows=begun,
        begin_lens=np.full_like(begun, length),
        begin_prompt_lens=np.full_like(begun, length * 3 // 4),
        begin_ids=ids if begins else ids[:0],
        bias_samples=rows,
        bias_ids=rows,
        bias_values=ones,
    )


def measure(kernels: Kernels, batch: int, length: int, steps: int) -> str:
    """This batch size's cells: median and minimum of a step, and of the first one, in ms."""
    logits = torch.randn(batch, VOCAB_SIZE)
    tokens = torch.randint(VOCAB_SIZE, (batch,))
    adjuster = LogitAdjuster(kernels, batch, VOCAB_SIZE, torch.device("cpu"))
    took: dict[bool, list[float]] = {True: [], False: []}
    with torch.inference_mode():
        for begins in [True] * 5 + [False] * steps:
            penalties = make_penalties(batch, length, begins)
            began = time.perf_counter()
            adjuster.adjust_(logits, penalties)
            adjuster.count_tokens(tokens, penalties)
            took[begins].append((time.perf_counter() - began) * 1e3)
    first, step = took[True], took[False]
    return f"{statistics.median(step):.3f} | {min(step):.3f} | {min(first):.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    operators: dict[str, Kernels] = {"torch": TorchKernels()}
    compiled = load_cpu_kernels(torch.float32)
    if compiled is not None:
        operators = {"compiled": compiled, **operators}
    lines = [
        f"| {name} | {batch} | {measure(kernels, batch, args.length, args.steps)} |"
        for name, kernels in operators.items()
        for batch in BATCHES
    ]
    header = "| operators | rows | step, median ms | step, minimum ms | start, minimum ms |"
    table = "\n".join([header, "|---|---|---|---|---|", *lines])
    print(table)
    if args.results:
        args.results.write_text(
            f"# Penalties per step, {date.today()}\n\n"
            f"`python benchmark/micro/penalties.py`: a vocabulary of {VOCAB_SIZE:,}, {args.length} "
            f"tokens per request, {args.steps} steps, {torch.get_num_threads()} threads. "
            f"{platform.machine()}, Python {platform.python_version()}, torch "
            f"{torch.__version__}.\n\n{table}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
