"""Offline throughput on random prompts: python benchmark/offline_throughput.py [--models NAME ...].

256 requests of 100 to 1,024 random tokens, answered with 100 to 1,024 tokens at temperature 0.6:
142,827 tokens in, 133,966 out, the same numbers as in the benchmarks of nano-vllm and mini-sglang.
Weights are random, in the shapes of benchmark/models. The result is compared with what the device
could do at best (roofline.py, with rates measured in the same run) and with transformers'
continuous batching.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from continuous_batching_peer import measure_peer
from minisrv.checkpoint.model_config import load_model_config
from minisrv.config import ServerConfig
from minisrv.sampling_params import SamplingParams
from minisrv.scheduler.build import build_loop
from minisrv.scheduler.channel import LocalChannel
from minisrv.start_progress import no_progress
from minisrv.wire.messages import AbortMsg, Finish, GenerateMsg
from roofline import Ideal, Rates, decode_step, ideal, measure_rates, synchronize
from step_timing import StepTimes, TimedLoop

MODELS = Path(__file__).parent / "models"
NUM_REQUESTS, SHORTEST, LONGEST, LAST_ID = 256, 100, 1024, 10_000
INPUT_TOKENS, OUTPUT_TOKENS = 142_827, 133_966
DECODE_BATCHES, DECODE_CONTEXT, DECODE_STEPS = (1, 64, 256), 800, 128
SAMPLING = SamplingParams(temperature=0.6, top_p=1.0, top_k=0, min_p=0.0, ignore_eos=True)
HOW = (
    "Ideal: prompts, then decode steps, without overlap, at the rates above. Host time is a turn "
    "of the loop minus its wait for the device (on a CPU: minus the model's computation). Idle is "
    "the time on the device between the end of a step and the point where the next one was "
    "submitted, measured by events; n/a on a CPU."
)
Requests = list[tuple[list[int], int]]


@dataclass
class Result:
    """One model's results: the whole workload, then decode steps at fixed batch sizes."""

    name: str
    requests: Requests
    seconds: float
    ideal: Ideal
    times: StepTimes
    peer_seconds: float | None = None
    decodes: list[tuple[int, float, float, StepTimes]] = field(default_factory=list)

    @property
    def output_tokens(self) -> int:
        """The output tokens of all requests."""
        return sum(count for _, count in self.requests)

    def line(self) -> str:
        """The row of the first table."""
        rate = self.output_tokens / self.seconds
        peer = ratio = "n/a"
        if self.peer_seconds is not None:
            peer = f"{self.output_tokens / self.peer_seconds:,.0f}"
            ratio = f"{self.peer_seconds / self.seconds:.2f}"
        return (
            f"| {self.name} | {rate:,.0f} | {self.ideal.tokens_per_second:,.0f} "
            f"| {rate / self.ideal.tokens_per_second:.3f} | {peer} | {ratio} "
            f"| {self.times.host_us(50):.0f} | {self.times.host_us(99):.0f} "
            f"| {self.times.gap_us(50)} | {self.times.gap_us(99)} | {_share(self.times)} |"
        )

    def decode_lines(self) -> list[str]:
        """The rows of the second table."""
        return [
            f"| {self.name} | {batch} | {took * 1e3:.3f} | {floor * 1e3:.3f} "
            f"| {times.host_us(50):.0f} | {times.host_us(99):.0f} "
            f"| {times.gap_us(50)} | {_share(times)} |"
            for batch, took, floor, times in self.decodes
        ]


HEADER = (
    "| model | tok/s | ideal | achieved / ideal | transformers tok/s | speed-up "
    "| host us per step, p50 | p99 | idle us per step, p50 | p99 | idle |\n" + "|---" * 11 + "|"
)
DECODE_HEADER = (
    "| model | decodes | ms per step | floor ms | host us, p50 | p99 | idle us, p50 | idle |\n"
    + "|---" * 8
    + "|"
)


def make_requests(count: int = NUM_REQUESTS, scale: float = 1.0) -> Requests:
    """The first `count` requests, from seed 0; `scale` shortens prompts and outputs."""
    rng = Random(0)
    prompts = [
        [rng.randint(0, LAST_ID) for _ in range(rng.randint(SHORTEST, LONGEST))]
        for _ in range(NUM_REQUESTS)
    ]
    outputs = [rng.randint(SHORTEST, LONGEST) for _ in range(NUM_REQUESTS)]
    assert sum(map(len, prompts)) == INPUT_TOKENS
    assert sum(outputs) == OUTPUT_TOKENS
    return [
        (prompt[: max(1, int(len(prompt) * scale))], max(2, int(output * scale)))
        for prompt, output in zip(prompts, outputs, strict=True)
    ][:count]


class Bench:
    """Drives a model with random weights by token ids, without a tokenizer."""

    def __init__(self, directory: Path, device: torch.device, options: dict[str, Any]) -> None:
        self.model = load_model_config(directory)
        config = ServerConfig(
            model=str(directory),
            device="cuda" if device.type == "cuda" else "cpu",
            dtype="bfloat16",
            load_format="dummy",
            max_seq_len=min(2 * LONGEST, self.model.max_position),
            **options,
        )
        self._channel, self._device = LocalChannel(), device
        loop = build_loop(config, directory, self._channel, no_progress)
        self._engine: Any = loop.engine
        self._timed = TimedLoop(loop, device)
        self._uid, self._wanted = 0, Counter[int]()
        self.memory = self._engine.describe()

    def run(self, requests: Requests) -> tuple[float, StepTimes]:
        """Seconds for all requests, and the times of the steps.

        Asserts that each request gets exactly as many tokens as it asks for.
        """
        self._send(requests)
        synchronize(self._device)
        began = time.perf_counter()
        while self._wanted:
            self._turn()
        seconds = time.perf_counter() - began
        return seconds, self._drain()

    def decode(
        self, batch: int, context: int, steps: int, after_prefill: Callable[[], None] = lambda: None
    ) -> tuple[float, StepTimes]:
        """Seconds per decode step of `batch` requests around `context` tokens, and step times."""
        length = max(1, context - steps // 2)
        rest = 2 * LONGEST - length
        rng = Random(batch)
        ids = range(self.model.vocab_size)
        self._send([(rng.choices(ids, k=length), rest) for _ in range(batch)])
        while max(self._wanted.values()) == rest:
            self._turn()
        self._timed.take()
        after_prefill()
        synchronize(self._device)
        began = time.perf_counter()
        for _ in range(steps):
            self._turn()
        seconds = (time.perf_counter() - began) / steps
        times = self._timed.take()
        assert len(self._wanted) == batch, "requests ended during the measurement"
        self._channel.inbox.append(AbortMsg(uids=tuple(self._wanted)))
        self._wanted.clear()
        self._drain()
        return seconds, times

    def close(self) -> None:
        """Free the device's memory."""
        self._engine.close()
        del self._timed, self._engine
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _send(self, requests: Requests) -> None:
        for prompt, count in requests:
            sampling = replace(SAMPLING, max_tokens=count)
            ids = np.array(prompt, np.int32)
            self._channel.inbox.append(
                GenerateMsg(uid=self._uid, prompt_ids=ids, sampling=sampling)
            )
            self._wanted[self._uid] = count
            self._uid += 1

    def _turn(self) -> None:
        self._timed.turn()
        while self._channel.outbox:
            message = self._channel.outbox.popleft()
            assert not message.failures, message.failures
            ended = message.finishes != Finish.NONE
            for uid, end in zip(message.uids.tolist(), ended.tolist(), strict=True):
                self._wanted[uid] -= 1
                assert end == (not self._wanted[uid]), (
                    "a request ended before it had all its tokens"
                )
                if end:
                    del self._wanted[uid]

    def _drain(self) -> StepTimes:
        """Settle the steps in flight; returns the times of all steps."""
        while self._timed.loop.busy or self._channel.inbox:
            self._timed.turn()
        self._channel.outbox.clear()
        return self._timed.take()


def bench_model(directory: Path, device: torch.device, rates: Rates, args: Namespace) -> Result:
    """Measure minisrv, then transformers, on the same device."""
    bench = Bench(directory, device, {"num_threads": args.threads} if args.threads else {})
    print(bench.memory, file=sys.stderr)
    size, scale = bench.model.vocab_size, args.scale
    requests = [
        ([token % size for token in prompt], count)
        for prompt, count in make_requests(args.requests, scale)
    ]
    bench.run([([token] * 16, 8) for token in range(8)])
    seconds, times = bench.run(requests)
    lengths = [(len(prompt), count) for prompt, count in requests]
    result = Result(directory.name, requests, seconds, ideal(bench.model, lengths, rates), times)
    context, steps = max(8, int(DECODE_CONTEXT * scale)), max(8, int(DECODE_STEPS * scale))
    for batch in (size for size in DECODE_BATCHES if size <= args.requests):
        took, times = bench.decode(batch, context, steps)
        floor = sum(decode_step(bench.model, batch, batch * context, rates))
        result.decodes.append((batch, took, floor, times))
    bench.close()
    if not args.no_peer:
        result.peer_seconds = measure_peer(directory, requests, device)
    return result


def report(results: Sequence[Result], device: torch.device, rates: Rates) -> str:
    """The Markdown page: two tables, and how they were measured."""
    requests = results[0].requests
    rows = [HEADER, *(result.line() for result in results)]
    decodes = [DECODE_HEADER, *(line for result in results for line in result.decode_lines())]
    return "\n".join(
        [
            f"# Offline throughput, {date.today()}\n",
            f"`python benchmark/offline_throughput.py {' '.join(sys.argv[1:])}`\n",
            f"{_device_name(device)} ({rates}). {_versions()}.\n",
            f"{len(requests)} requests, {sum(len(p) for p, _ in requests):,} tokens in, "
            f"{results[0].output_tokens:,} out, temperature 0.6, random weights in bfloat16. "
            f"{HOW}\n",
            *rows,
            f"\nDecode steps around {DECODE_CONTEXT} tokens of context (scaled like the rest):\n",
            *decodes,
        ]
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{torch.get_num_threads()} CPU threads"


def _versions() -> str:
    """Versions of what is installed; minisrv itself may run from the source tree."""
    found = [f"Python {platform.python_version()}"]
    for name in ("minisrv", "torch", "transformers", "numpy", "flashinfer-python", "triton"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def _share(times: StepTimes) -> str:
    return f"{times.gap_share:.1%}" if times.gaps else "n/a"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["Qwen3-0.6B"],
        help="names in benchmark/models, or directories",
    )
    parser.add_argument(
        "--requests", type=int, default=NUM_REQUESTS, help="how many of the 256 requests to run"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor for all lengths")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--no-peer", action="store_true", help="do not run transformers")
    parser.add_argument("--results", type=Path, help="write the page to this file")
    args = parser.parse_args()
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    rates = measure_rates(device)
    results = []
    for name in args.models:
        directory = MODELS / name if (MODELS / name).is_dir() else Path(name)
        results.append(bench_model(directory, device, rates, args))
        page = report(results, device, rates)
        if args.results:  # after each model, so that an interrupted run leaves its results
            args.results.write_text(page + "\n")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
