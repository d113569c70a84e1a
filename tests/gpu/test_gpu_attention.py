"""FlashInfer's attention against the same in float64 on the same numbers."""

# Shapes: T tokens in the step, H query heads, K key-value heads, D head size, N cached tokens.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from build_flashinfer import CHECKED, CHECKED_DECODES, KV_DTYPES, Attention, Decode
from minisrv.checkpoint.model_config import ModelConfig, RopeConfig
from minisrv.config import ServerConfig
from minisrv.engine.attention.flashinfer import FlashInferAttention
from minisrv.engine.backends import choose_backends, device_kernels
from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.graph_shapes import GraphShape
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.page_table import PageTable
from minisrv.engine.step_buffer import StepBuffer, StepLimits, StepTensors
from tests.support.step_driver import sampling_columns

NUM_KV_HEADS, MAX_LEN, NUM_ROWS = 2, 1200, 16
# (decodes, prompt chunks, whether the chunks continue what is cached)
STEPS = {
    "decode": (9, 0, False),
    "prefill": (0, 4, False),
    "extend": (0, 4, True),
    "mixed": (5, 3, True),
    "graph": (9, 0, False),
    "mixed-graph": (5, 3, True),
}
SHAPES = {"graph": GraphShape(9), "mixed-graph": GraphShape(8, 900)}
TOLERANCE = {"bfloat16": 1.6e-2, "float16": 2e-3}
XQA_IN_FP8 = 5e-2  # it rounds queries and probabilities to FP8, too


def make_cases() -> list[Any]:
    """Every group and page size for the first module, a few for the others.

    Without a GPU one step of each kind runs, on the stand-ins for FlashInfer's wrappers; for all
    modules but the first only the one with everything, and the rest in the soak.
    """
    cases = []
    for module in CHECKED:
        first = module is CHECKED[0]
        for group in (1, 2, 4, 5, 6, 7, 8, 16) if first else (4, 6, 16):
            for page_size in (1, 16, 64) if first else (16,):
                for kind in STEPS:
                    name = f"{module}-group{group}-page{page_size}-{kind}"
                    marks = [pytest.mark.also_cpu] if (group, page_size) == (4, 16) else []
                    marks += [] if first or kind == "mixed-graph" else [pytest.mark.soak]
                    cases.append(pytest.param(module, group, page_size, kind, id=name, marks=marks))
    return cases


def make_decode_cases() -> list[Any]:
    """As above, for the kernels of --decode-kernel: the steps that have decodes."""
    cases = []
    for decode in CHECKED_DECODES:
        for group in (1, 2, 4, 8) if decode.group is None else (decode.group,):
            for kind in ("decode", "mixed", "graph", "mixed-graph"):
                name = f"{decode.kernel}-{decode.attention}-group{group}-{kind}"
                marks = [pytest.mark.also_cpu] if group in (2, 4) else []
                marks += [] if group == 2 and "graph" in kind else [pytest.mark.soak]
                cases.append(pytest.param(decode, group, kind, id=name, marks=marks))
    return cases


@pytest.fixture
def place(device: torch.device) -> tuple[torch.device, Callable[..., Any]]:
    """The device, and the function that expands a step's words on it."""
    if device.type == "cuda":
        return device, device_kernels().expand
    from tests.support.device_parts import expand

    return device, expand


def make_pool(module: Attention, page_size: int, num_heads: int, device: torch.device) -> KVPool:
    """Filled with random numbers."""
    config = ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=10,
        hidden_size=64,
        intermediate_size=64,
        num_layers=2,
        num_heads=num_heads,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=module.head_dim,
        max_position=MAX_LEN,
        max_seq_len=MAX_LEN,
        norm_eps=1e-6,
        rope=RopeConfig(),
    )
    dtype = getattr(torch, module.dtype)
    stored = KV_DTYPES[module.kv_dtype] or dtype
    pool = KVPool(config, NUM_KV_HEADS, page_size, dtype, device, stored)
    pool.allocate(NUM_ROWS * -(-MAX_LEN // page_size), spare=1)
    for pages in pool.pages:
        for tensor in pages:
            tensor.copy_(torch.randn(tensor.shape, dtype=dtype, device=device))
    return pool


def make_attention(pool: KVPool, num_heads: int, decode_kernel: Any) -> FlashInferAttention:
    if pool.device.type == "cpu":
        return FlashInferAttention(pool, num_heads, 2**27, decode_kernel)
    config = ServerConfig(cuda_graph_max_tokens=1024, decode_kernel=decode_kernel)
    kernels, attention = choose_backends(config, pool, num_heads)
    assert type(kernels).__name__ == "CudaKernels"
    assert isinstance(attention, FlashInferAttention)
    return attention


def make_batch(kind: str, rng: np.random.Generator) -> ForwardBatch:
    num_decodes, num_chunks, continued = STEPS[kind]
    size = num_decodes + num_chunks
    query_lens = np.ones(size, np.int32)
    query_lens[num_decodes:] = rng.integers(1, 300, num_chunks)
    starts = rng.integers(0, MAX_LEN - 300, size).astype(np.int32)
    if not continued:
        starts[num_decodes:] = 0
    none = np.empty(0, np.int32)
    return ForwardBatch(
        step_id=1,
        num_decodes=num_decodes,
        rows=rng.permutation(NUM_ROWS)[:size].astype(np.int32),
        query_lens=query_lens,
        start_positions=starts,
        prefill_ids=np.zeros(query_lens[num_decodes:].sum(), np.int32),
        page_rows=none,
        page_columns=none,
        page_ids=none,
        sample_indices=none,
        sampling=sampling_columns(0),
    )


def attend(batch: ForwardBatch, table: PageTable, pool: KVPool, q_THD: Tensor) -> Tensor:
    """Causal attention of each sequence to the contents of its pages, in float64."""
    keys, values = pool.pages[1]
    outputs, first = [], 0
    for row, start, count in zip(batch.rows, batch.start_positions, batch.query_lens, strict=True):
        kv_len = int(start + count)
        pages = torch.from_numpy(table.pages[row, : -(-kv_len // table.page_size)].astype(np.int64))
        k, v = (gather(x, pages.to(x.device))[:kv_len].double() for x in (keys, values))
        q = q_THD[first : first + int(count)].double()
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("thd,nhd->htn", q, k) / q.shape[-1] ** 0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(
            int(start) + 1
        )
        probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("htn,nhd->thd", probs, v))
        first += int(count)
    return torch.cat(outputs)


def places_of_tokens(batch: ForwardBatch, num_decodes: int) -> list[int]:
    """Where the tokens are in a step that has been padded to `num_decodes` decodes."""
    return [*range(batch.num_decodes), *range(num_decodes, num_decodes + batch.prefill_ids.size)]


def gather(pages_NPKD: Tensor, chosen: Tensor) -> Tensor:
    """The tokens of some pages, in the dtype of the cache; viewed as bytes, because torch does not
    index FP8 on every device.
    """
    tokens = pages_NPKD.view(torch.uint8)[chosen].flatten(0, 1)
    return tokens.view(pages_NPKD.dtype)


def store(slots_NKD: Tensor, slots_T: Tensor, x_TKD: Tensor) -> None:
    """Write to the cache in its dtype, viewed as bytes like `gather`."""
    stored = x_TKD.to(slots_NKD.dtype).contiguous()
    slots_NKD.view(torch.uint8).index_copy_(0, slots_T, stored.view(torch.uint8))


@pytest.mark.parametrize(("module", "group", "page_size", "kind"), make_cases())
def test_attention(
    place: tuple[torch.device, Callable[..., Any]],
    module: Attention,
    group: int,
    page_size: int,
    kind: str,
) -> None:
    hold_against_float64(place, module, group, page_size, kind)


@pytest.mark.parametrize(("decode", "group", "kind"), make_decode_cases())
def test_decode_kernel(
    place: tuple[torch.device, Callable[..., Any]], decode: Decode, group: int, kind: str
) -> None:
    hold_against_float64(place, decode.attention, group, 16, kind, decode.kernel)


def hold_against_float64(
    place: tuple[torch.device, Callable[..., Any]],
    module: Attention,
    group: int,
    page_size: int,
    kind: str,
    decode_kernel: str = "auto",
) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(page_size * group)
    (device, expand), num_heads = place, group * NUM_KV_HEADS
    pool = make_pool(module, page_size, num_heads, device)
    attention = make_attention(pool, num_heads, decode_kernel)
    table = PageTable(NUM_ROWS, MAX_LEN, page_size)
    table.pages[:] = rng.permutation(pool.num_pages).reshape(table.pages.shape)
    limits = StepLimits(NUM_ROWS, 1200, MAX_LEN, page_size)
    tensors = StepTensors(limits, device, spare_page=pool.num_pages)
    tensors.page_table[:NUM_ROWS] = torch.from_numpy(table.pages)
    buffer = StepBuffer(limits, tensors)
    attention.read_from(tensors)
    for _ in range(3):
        batch = make_batch(kind, rng)
        step = buffer.send(batch, SHAPES.get(kind))
        plan = attention.plan_for_graph if kind in SHAPES else attention.plan
        plan(step)
        expand(tensors, limits, step.num_decodes + step.num_prefills)
        attention.begin()
        size, places = step.num_tokens, places_of_tokens(batch, step.num_decodes)
        heads = (num_heads, NUM_KV_HEADS, NUM_KV_HEADS)
        qkv = torch.randn(size, sum(heads), module.head_dim, dtype=pool.dtype, device=device)
        q_THD, k_TKD, v_TKD = qkv.split_with_sizes(heads, 1)
        slots = attention.cache_slots(1)
        store(slots.keys_NKD, slots.slots_T, k_TKD)
        store(slots.values_NKD, slots.slots_T, v_TKD)
        ours = attention.forward(q_THD, k_TKD, v_TKD, 1)
        buffer.mark_launched()
        expected = attend(batch, table, pool, q_THD[places])
        in_fp8 = decode_kernel == "xqa" and module.kv_dtype == "fp8"
        tolerance = XQA_IN_FP8 if in_fp8 else TOLERANCE[module.dtype]
        torch.testing.assert_close(ours[places].double(), expected, rtol=tolerance, atol=tolerance)
