"""Keys and values kept in FP8: stored, attended to, and end to end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from minisrv.checkpoint.model_config import ModelConfig, RopeConfig
from minisrv.engine.attention.torch_native import TorchNativeAttention
from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.kernels.base import CacheSlots
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.kv_pool import KVPool
from minisrv.engine.page_table import PageTable
from tests.engine.test_fp8 import write_pair
from tests.support.checkpoints import make_checkpoint
from tests.support.step_driver import StepDriver, open_engine, sampling_columns

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, MAX_LEN = 6, 2, 16, 120
E4M3 = torch.float8_e4m3fn
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=10,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=NUM_HEADS,
    num_kv_heads=NUM_KV_HEADS,
    head_dim=HEAD_DIM,
    max_position=MAX_LEN,
    max_seq_len=MAX_LEN,
    norm_eps=1e-6,
    rope=RopeConfig(),
)


def chunk(rows: list[int], starts: list[int], lens: list[int], num_decodes: int) -> ForwardBatch:
    none = np.empty(0, np.int32)
    return ForwardBatch(
        step_id=0,
        num_decodes=num_decodes,
        rows=np.array(rows, np.int32),
        query_lens=np.array(lens, np.int32),
        start_positions=np.array(starts, np.int32),
        prefill_ids=np.zeros(sum(lens[num_decodes:]), np.int32),
        page_rows=none,
        page_columns=none,
        page_ids=none,
        sample_indices=none,
        sampling=sampling_columns(0),
    )


def test_torch_attends_to_the_rounded_keys_and_values() -> None:
    """Against attention in float32 over all that a sequence has been given, rounded to e4m3."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    pool = KVPool(CONFIG, NUM_KV_HEADS, 4, torch.float32, device, E4M3)
    pool.allocate(3 * MAX_LEN // 4)
    table = PageTable(3, MAX_LEN, 4)
    table.pages[:] = np.random.default_rng(0).permutation(pool.num_pages).reshape(3, -1)
    attention, kernels = TorchNativeAttention(pool), TorchKernels()
    seen = {row: torch.empty(2, 0, NUM_KV_HEADS, HEAD_DIM) for row in range(3)}
    steps = [
        chunk([0, 1], [0, 0], [17, 1], 0),
        chunk([1, 0], [1, 17], [1, 30], 1),
        chunk([0, 1, 2], [47, 2, 0], [1, 1, 9], 2),
        chunk([2, 0, 1], [9, 48, 3], [1, 1, 1], 3),
    ]
    for batch in steps:
        num_tokens = int(batch.query_lens.sum())
        qkv = torch.randn(num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM)
        q, k, v = qkv.split_with_sizes([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], 1)
        attention.plan(batch, table)
        straight = torch.ones(num_tokens, 1, HEAD_DIM), torch.zeros(num_tokens, 1, HEAD_DIM)
        kernels.norm_rotate_store_(qkv, NUM_HEADS, None, straight, attention.cache_slots(0))
        ours = attention.forward(q, k, v, 0)
        first = 0
        for row, length in zip(batch.rows.tolist(), batch.query_lens.tolist(), strict=True):
            part = slice(first, first + length)
            first += length
            given = torch.stack([k[part], v[part]]).to(E4M3).float()
            seen[row] = torch.cat([seen[row], given], 1)
            keys, values = seen[row].transpose(1, 2)
            kv_len = keys.shape[1]
            mask = torch.ones(length, kv_len, dtype=torch.bool).tril(kv_len - length)
            expected = F.scaled_dot_product_attention(
                q[part].transpose(0, 1), keys, values, attn_mask=mask, enable_gqa=True
            )
            torch.testing.assert_close(ours[part], expected.transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_does_not_fit_is_stored_as_the_largest_number(dtype: torch.dtype) -> None:
    keys, values = torch.zeros(2, 8, 1, 4, dtype=E4M3)
    qkv = torch.tensor([[[1.0] * 4, [449.0, -1e6, 448.0, 3.0], [1e4, -500.0, 0.0, 1.0]]]).to(dtype)
    rope = torch.ones(1, 1, 4, dtype=dtype), torch.zeros(1, 1, 4, dtype=dtype)
    cache = CacheSlots(torch.tensor([5]), keys, values)
    TorchKernels().norm_rotate_store_(qkv, 1, None, rope, cache)
    assert keys[5].tolist() == [[448.0, -448.0, 448.0, 3.0]]
    assert values[5].tolist() == [[448.0, -448.0, 0.0, 1.0]]
    assert not keys.float()[:5].any()


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, length).tolist()


class RoundedCache(DynamicCache):
    """The cache of transformers with what it is given rounded to e4m3."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rounded = [x.clamp(-448, 448).to(E4M3).to(x.dtype) for x in (keys, values)]
        return super().update(*rounded, *args, **kwargs)


@pytest.mark.parametrize(
    ("architecture", "distance"), [("llama", 0.4), ("qwen3", 0.1), ("qwen3_moe", 0.1)]
)
def test_logits_are_those_of_transformers_with_a_rounded_cache(
    tmp_path: Path, architecture: str, distance: float
) -> None:
    """And within `distance` of the plain cache's: this llama attends to very few tokens."""
    path = make_checkpoint(tmp_path, architecture)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()
    prompts = [prompt(seed, 40) for seed in range(6)]
    logits = []
    for kind in ("auto", "fp8"):
        driver = StepDriver(open_engine(path, kv_cache_dtype=kind))
        sequences = [driver.add() for _ in prompts]
        driver.run(prefills=list(zip(sequences, prompts, strict=True)), samples=[])
        logits.append(driver.logits(prefills=[(sequence, [7]) for sequence in sequences]))
    plain, ours = logits
    with torch.no_grad():
        outputs = [
            model(torch.tensor([[*ids, 7]]), past_key_values=RoundedCache(config=model.config))
            for ids in prompts
        ]
    expected = torch.stack([output.logits[0, -1] for output in outputs])
    assert error(ours, expected) < 0.01
    assert 0.02 < error(ours, plain) < distance


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("budget", [5, 16, 33])
def test_a_prompt_that_is_cut_or_cached_has_the_text_of_a_fresh_one(
    tmp_path: Path, budget: int
) -> None:
    engine = open_engine(make_checkpoint(tmp_path, "llama"), kv_cache_dtype="fp8")
    driver, ids = StepDriver(engine), prompt(1, 50)
    whole = driver.generate(ids, 12)
    cut = driver.add()
    for first in range(0, 50, budget):
        tokens = driver.run(prefills=[(cut, ids[first : first + budget])])
    while len(tokens) < 12:
        tokens += driver.run(decodes=[cut])
    assert tokens == whole


def test_pages_take_half_of_those_in_bfloat16(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    plain, rounded = (
        open_engine(path, dtype="bfloat16", kv_memory="1MiB", kv_cache_dtype=kind)
        for kind in ("auto", "fp8")
    )
    assert rounded.num_pages // 2 == plain.num_pages


def test_scales_of_the_cache_in_a_checkpoint_are_left_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = write_pair(tmp_path, "llama", "matrix")
    tensors = load_file(path / "model.safetensors")
    for layer in range(3):
        for part in "kv":
            tensors[f"model.layers.{layer}.self_attn.{part}_scale"] = torch.ones(1)
    save_file(tensors, path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        open_engine(path)
        assert "k_scale" not in caplog.text
        open_engine(path, kv_cache_dtype="fp8")
    assert [r.getMessage() for r in caplog.records if "k_scale" in r.getMessage()] == [
        "ignoring the checkpoint's k_scale and v_scale: the FP8 cache uses a scale of 1"
    ]
