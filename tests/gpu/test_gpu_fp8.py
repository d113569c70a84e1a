"""FP8 on a GPU: the KV cache, and weights by FlashInfer, torch and Triton."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from minisrv.engine import fp8
from minisrv.engine.layers.fp8_linear import Fp8Linear
from tests.engine.test_fp8 import FP8, SCHEMES, write_pair
from tests.engine.test_fp8_cache import RoundedCache
from tests.support.checkpoints import EOS_ID
from tests.support.half_models import (
    GREEDY,
    assert_best,
    generate,
    load,
    logits_of,
    save_checkpoint,
)
from tests.support.oracle import make_prompts
from tests.support.step_driver import StepDriver, open_engine

BLOCK = 32
IDS = list(range(1, 40))


@pytest.mark.also_cpu
@pytest.mark.parametrize(
    "largest", [pytest.param(0, id="eager", marks=pytest.mark.soak), pytest.param(8, id="graphs")]
)
def test_tokens_with_an_fp8_cache(tmp_path: Path, device: torch.device, largest: int) -> None:
    """As transformers' with the same rounding; in chunks, cold and from the cache."""
    path = save_checkpoint(tmp_path, "qwen3", 128)
    prompts = make_prompts(12, EOS_ID, longest=150)
    outputs = generate(
        path,
        device,
        [*prompts, *prompts],
        [GREEDY] * 24,
        kv_cache_dtype="fp8",
        cuda_graph_max_bs=largest,
        max_running_requests=8,
    )
    assert sum(output.cached_tokens for output in outputs[12:]) > 0
    model = load(path, torch.float32, device)
    for output in outputs:
        prompt, (choice,) = output.prompt_token_ids, output.outputs
        cache = RoundedCache(config=model.config)
        logits = logits_of(model, [*prompt, *choice.token_ids], past_key_values=cache)
        assert_best(logits, prompt, choice, GREEDY, margin=0.6)


def round_inputs(model: PreTrainedModel, group: int | None) -> None:
    """Have every projection round its input to FP8, with a scale per token and group."""

    def round_input(module: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        rows = args[0].flatten(0, -2)
        size = group or rows.shape[1]
        values, scales = fp8.quantize(rows, size)
        return (values.float() * scales.repeat_interleave(size, 1)).view(args[0].shape)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(round_input)


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param("row", marks=pytest.mark.also_cpu),
        pytest.param("matrix", marks=pytest.mark.also_cpu),
        "block",
    ],
)
def test_logits_with_fp8_weights(
    tmp_path: Path, device: torch.device, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding the inputs costs as much as it costs transformers.

    Rows and matrices are torch's product, blocks are ours, which a CPU does not have.
    """
    block = {**FP8, "weight_block_size": [BLOCK, BLOCK]}
    monkeypatch.setattr("tests.engine.test_fp8.BLOCK", (BLOCK, BLOCK))
    monkeypatch.setitem(SCHEMES, "block", ("_scale_inv", block))
    if device.type == "cpu":
        monkeypatch.setattr("minisrv.engine.rank_engine.keeps_fp8", lambda *args: True)
    quantized, plain = write_pair(tmp_path, "qwen3", scheme)
    engine = open_engine(quantized, device=device.type, dtype="bfloat16", num_pages=100)
    assert engine.placement.endswith("FP8 products")
    driver = StepDriver(engine)
    ours = driver.logits(prefills=[(driver.add(), IDS)])[0].cpu()
    model = load(plain, torch.float32, device)
    exact = logits_of(model, IDS)[-1]
    round_inputs(model, BLOCK if scheme == "block" else None)
    expected = logits_of(model, IDS)[-1]
    assert (ours - exact).norm() < 1.5 * (expected - exact).norm()


@pytest.mark.parametrize("num_tokens", [1, 40, 300])
@pytest.mark.parametrize(
    ("group", "dtype"),
    [
        pytest.param(1024, torch.bfloat16, marks=pytest.mark.also_cpu),
        pytest.param(1024, torch.float16, marks=pytest.mark.also_cpu),
        (128, torch.bfloat16),
        (64, torch.float16),
    ],
)
def test_fp8_products(
    device: torch.device, group: int, dtype: torch.dtype, num_tokens: int
) -> None:
    """Against float64 on the same rounded numbers, with a scale per row or per group of columns."""
    torch.manual_seed(0)
    inputs, outputs = 1024, 2064
    values = torch.randn(outputs, inputs, device=device).to(torch.float8_e4m3fn)
    scales = torch.rand(outputs, inputs // group, device=device) * 0.01
    matrix = fp8.Fp8Matrix(values, scales, group)
    x = torch.randn(num_tokens, inputs, device=device).to(dtype)
    rounded, x_scales = fp8.quantize(x, group)
    exact = rounded.double() * x_scales.double().repeat_interleave(group, 1)
    expected = exact @ matrix.dequantized().double().T
    bias = torch.randn(outputs, device=device).to(dtype)
    ours = Fp8Linear(matrix, bias)(x)
    assert ours.dtype is dtype
    torch.testing.assert_close(ours.double(), expected + bias, rtol=2e-2, atol=2e-2)
