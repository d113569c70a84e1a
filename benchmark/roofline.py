"""What a device could do at best: its measured rates, and the time a workload takes at them.

Everything is computed once and nothing overlaps: first the prompts, at the rate of matrix products,
then one decode step after another. A step takes the longer of reading the weights and multiplying
with them, plus the time to read the cache, plus the time to write and read the activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from minisrv.checkpoint.model_config import ModelConfig
from minisrv.engine.model_size import count_parameters, kv_bytes_per_token
from minisrv.engine.parallel.shard import Sharding

ITEMSIZE = 2
_REPETITIONS = 5


@dataclass(frozen=True)
class Rates:
    """bandwidth: bytes per second of a copy, read plus written.

    flops: of a matrix product in bf16, or in float32 on a CPU that multiplies it faster.
    """

    bandwidth: float
    flops: float

    def __str__(self) -> str:
        return f"copy {self.bandwidth / 1e12:.3g} TB/s, GEMM {self.flops / 1e12:.3g} TFLOP/s"


@dataclass(frozen=True)
class Ideal:
    """Seconds for the parts of a workload, and the tokens it produces."""

    prefill: float
    products: float  # per step, the longer of reading weights and computing
    cache: float
    activations: float
    output_tokens: int

    @property
    def seconds(self) -> float:
        """The sum of all parts."""
        return self.prefill + self.products + self.cache + self.activations

    @property
    def tokens_per_second(self) -> float:
        """Output tokens divided by the whole time."""
        return self.output_tokens / self.seconds


def measure_rates(device: torch.device) -> Rates:
    """The best of a few repetitions, on random data of sizes that do not fit into caches.

    On constants a GPU takes less power, and so keeps a higher clock, than on a model's numbers.
    """
    cuda = device.type == "cuda"
    size, edge = (2**30, 8192) if cuda else (2**26, 1024)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    dtypes = (torch.bfloat16,) if cuda else (torch.bfloat16, torch.float32)
    matrices = [torch.randn(edge, edge, dtype=dtype, device=device) for dtype in dtypes]
    return Rates(
        bandwidth=2 * size / _best(device, partial(target.copy_, source)),
        flops=2 * edge**3 / min(_best(device, partial(torch.mm, a, a)) for a in matrices),
    )


def measure_read_bandwidth() -> float:
    """Bytes per second of a plain read loop on the CPU: torch's sum of 1 GiB, with its threads."""
    source = torch.ones(2**28)
    return source.nbytes / _best(source.device, source.sum)


def ideal(
    model: ModelConfig,
    lengths: Sequence[tuple[int, int]],
    rates: Rates,
    weight_bytes: float = ITEMSIZE,
) -> Ideal:
    """The ideal time of requests that run together; `lengths`: (prompt, output) tokens of each.

    weight_bytes: the mean size of a weight.
    """
    prompts, outputs = (np.array(column, np.int64) for column in zip(*lengths, strict=True))
    parts = np.zeros(3)
    for step in range(1, int(outputs.max())):
        live = outputs > step
        cached_tokens = int((prompts[live] + step).sum())
        parts += decode_step(model, int(live.sum()), cached_tokens, rates, weight_bytes)
    products, cache, activations = parts.tolist()
    return Ideal(
        prefill=_prefill_flops(model, prompts) / rates.flops,
        products=products,
        cache=cache,
        activations=activations,
        output_tokens=int(outputs.sum()),
    )


def decode_step(
    model: ModelConfig,
    batch: int,
    cached_tokens: int,
    rates: Rates,
    weight_bytes: float = ITEMSIZE,
) -> tuple[float, float, float]:
    """Seconds for products, cache and activations; `cached_tokens` counts the whole batch."""
    parameters = count_parameters(model)
    touched = 1 - (1 - parameters.experts_read) ** batch  # share of the experts, if chosen evenly
    dense = parameters.matrices + parameters.head_products + parameters.vectors
    read = (dense + parameters.experts * touched) * weight_bytes
    flops = 2 * (parameters.layer_products + parameters.head_products) * batch
    cache = cached_tokens * kv_bytes_per_token(model, ITEMSIZE, Sharding())
    return (
        max(read / rates.bandwidth, flops / rates.flops),
        cache / rates.bandwidth,
        batch * _activation_bytes(model) / rates.bandwidth,
    )


def _prefill_flops(model: ModelConfig, prompts: np.ndarray) -> float:
    """Matrix products and causal attention of all prompt tokens, without the head."""
    products = 2 * count_parameters(model).layer_products * int(prompts.sum())
    width = model.num_layers * model.num_heads * model.head_dim
    return products + 2 * width * int((prompts**2).sum())


def _activation_bytes(model: ModelConfig) -> int:
    """Bytes per token: each operator's output and the logits, written once and read once."""
    hidden, heads = model.hidden_size, model.num_heads + 2 * model.num_kv_heads
    features, experts = model.intermediate_size, 1
    if model.moe is not None:
        features, experts = model.moe.intermediate_size, model.moe.num_experts_per_token
    layer = (heads + model.num_heads) * model.head_dim + hidden + experts * (3 * features + hidden)
    return 2 * ITEMSIZE * (model.num_layers * layer + model.vocab_size)


def _best(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds of the fastest run, not counting the first."""
    seconds = []
    for _ in range(_REPETITIONS + 1):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
