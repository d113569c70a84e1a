"""Where the time of a decode step goes on a CPU: python benchmark/micro/step_profile.py.

Decodes with random weights at several batch sizes, and times every operator of the kernels, every
product and every attention. `model` is a folder with a config.json (default: Qwen3-0.6B).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

BENCHMARK = Path(__file__).parent.parent
sys.path.insert(0, str(BENCHMARK))

from minisrv.engine.attention.cpu import CpuAttention  # noqa: E402
from minisrv.engine.kernels.cpu import CpuKernels  # noqa: E402
from minisrv.engine.layers import embedding, linear  # noqa: E402
from offline_throughput import Bench  # noqa: E402
from roofline import decode_step, measure_rates  # noqa: E402

CPU = torch.device("cpu")
OPERATORS = {
    "norms": (CpuKernels, "add_rms_norm_"),
    "rotation, cache write": (CpuKernels, "norm_rotate_store_"),
    "activation": (CpuKernels, "silu_and_mul"),
    "attention": (CpuAttention, "forward"),
    "argmax": (CpuKernels, "argmax"),
}


class Profile:
    """Seconds and calls per part, added up over steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def clear(self) -> None:
        self.seconds.clear()
        self.calls.clear()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is added to `part`."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - began
                self.calls[part] += 1

        return run

    def install(self) -> None:
        """Time the parts of every model that is built from now on."""
        for part, (owner, name) in OPERATORS.items():
            setattr(owner, name, self.timed(part, getattr(owner, name)))
        make, make_head = linear.make_product, linear.make_float32_product
        linear.make_product = lambda *args: self.timed("products of layers", make(*args))
        embedding.make_float32_product = lambda *args: self.timed("head", make_head(*args))
        make_packed, packed_head = linear.make_packed_product, embedding.as_float32_product
        linear.make_packed_product = lambda *args: self.timed(
            "products of layers", make_packed(*args)
        )
        embedding.as_float32_product = lambda product: self.timed("head", packed_head(product))

    def rows(self, seconds: float, steps: int) -> list[str]:
        """Lines of the table, largest part first; the rest is Python, torch and the scheduler."""
        parts = sorted(self.seconds.items(), key=lambda item: -item[1])
        parts.append(("everything else", seconds * steps - sum(self.seconds.values())))
        return [
            f"| {part} | {1e3 * total / steps:.2f} | {total / steps / seconds:.1%} "
            f"| {self.calls[part] / steps:.0f} |"
            for part, total in parts
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = BENCHMARK / "models" / "Qwen3-0.6B"
    parser.add_argument("model", type=Path, nargs="?", default=default)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--context", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="none")
    args = parser.parse_args()
    rates, profile = measure_rates(CPU), Profile()
    profile.install()
    options = {"num_threads": args.threads} if args.threads else {}
    bench = Bench(args.model, CPU, {**options, "quantization": args.quantization})
    print(f"{args.model.name}, {torch.get_num_threads()} threads, {rates}")
    for batch in args.batches:
        seconds, _ = bench.decode(batch, args.context, args.steps, profile.clear)
        floor = sum(decode_step(bench.model, batch, batch * args.context, rates))
        print(f"\nBatch {batch}: {1e3 * seconds:.2f} ms per step, {batch / seconds:.1f} tok/s;")
        print(f"ideal {1e3 * floor:.2f} ms, achieved/ideal {floor / seconds:.2f}\n")
        print("| part | ms per step | share | calls per step |\n|---|---|---|---|")
        print("\n".join(profile.rows(seconds, args.steps)))
    bench.close()


if __name__ == "__main__":
    main()
