"""Products with packed weights beside those with bfloat16 weights, at the shapes of a model.

    python benchmark/micro/packed_products.py [--types Q8_0 Q4_0 Q4_K Q6_K] [--threads 2]

For one row, the time of all matrices of a layer is given as the rate at which they are read, beside
that of a plain read of memory; they are too many for the caches. For more rows, as GFLOP/s.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from minisrv.engine.gguf_packed import KINDS, from_gguf
from minisrv.engine.kernels.cpu import load_cpu_kernels
from minisrv.engine.layers.linear import make_product
from minisrv.engine.layers.packed_linear import make_packed_product

# outputs, inputs: query with key and value, attention's output, gate with up, down
SHAPES = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]
COPIES = 8  # of a layer, so that weights come from memory
Products = Sequence[Callable[[torch.Tensor], torch.Tensor]]


def packed_layer(name: str) -> tuple[Products, int]:
    """The products of a layer with random weights of a GGUF type, and their bytes."""
    kernels, kind = load_cpu_kernels(torch.bfloat16), GGMLQuantizationType[name]
    assert kernels is not None
    products, num_bytes = [], 0
    block, size = GGML_QUANT_SIZES[kind]
    for outputs, inputs in SHAPES:
        raw = torch.randint(0, 60, (outputs, inputs // block * size), dtype=torch.uint8)
        matrix = from_gguf(kind, raw, (outputs, inputs))
        products.append(make_packed_product(kernels, matrix, None, torch.bfloat16))
        num_bytes += matrix.num_bytes
    return products, num_bytes


def plain_layer() -> tuple[Products, int]:
    """The same in bfloat16."""
    kernels = load_cpu_kernels(torch.bfloat16)
    assert kernels is not None
    weights = [torch.randn(shape).bfloat16() for shape in SHAPES]
    products = [make_product(kernels, weight) for weight in weights]
    return products, sum(weight.nbytes for weight in weights)


def seconds(run: Callable[[], object], repeats: int = 7) -> float:
    """The median of several runs, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def read_rate(size: int = 1 << 29) -> float:
    """Bytes per second of a plain read: the sum of 2 GiB of floats."""
    numbers = torch.ones(size)
    return numbers.nbytes / seconds(numbers.sum, 3)


def report(name: str, layers: Sequence[tuple[Products, int]], rows: Sequence[int]) -> None:
    """A row of the table."""
    flops = 2 * sum(outputs * inputs for outputs, inputs in SHAPES) * len(layers)
    cells = []
    for num_rows in rows:
        x = {i: torch.randn(num_rows, i).bfloat16() for _, i in SHAPES}

        def run(x: dict[int, torch.Tensor] = x) -> None:
            for products, _ in layers:
                for product, (_, inputs) in zip(products, SHAPES, strict=True):
                    product(x[inputs])

        taken = seconds(run)
        if num_rows == 1:
            cells.append(f"{sum(size for _, size in layers) / taken / 1e9:.1f} GB/s")
        cells.append(f"{flops * num_rows / taken / 1e9:.0f}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = ["Q8_0", "Q4_0", "Q4_K", "Q6_K"]
    parser.add_argument(
        "--types", nargs="*", choices=sorted(k.name for k in KINDS), default=default
    )
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 256])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, plain read {read_rate() / 1e9:.1f} GB/s; GFLOP/s by rows:\n")
    columns = [f"{n} rows" if n > 1 else "1 row: read | 1 row" for n in args.rows]
    print(f"| weights | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
    for name in ["bfloat16", *args.types]:
        layers = [
            plain_layer() if name == "bfloat16" else packed_layer(name) for _ in range(COPIES)
        ]
        report(name, layers, args.rows)


if __name__ == "__main__":
    main()
