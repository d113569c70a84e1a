"""Products with FP8 matrices as they are stored: torch has on a CPU the one that a GPU uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from minisrv.checkpoint.model_config import Fp8Config
from minisrv.config import ServerConfig
from minisrv.engine import backends, fp8
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.layers.fp8_linear import Fp8Linear, can_multiply
from minisrv.engine.layers.linear import Projection, load_linear, load_row_parallel_linear
from minisrv.engine.parallel.shard import Shard, Sharding
from minisrv.engine.weights import CheckpointWeights
from tests.engine.test_fp8 import quantize, write_pair
from tests.support.step_driver import StepDriver, open_engine

CPU = torch.device("cpu")
IDS = list(range(1, 40))
# A row rounded to e4m3 errs by up to 1 in 16 in each number, and by far less in a sum of them.
ROUNDING = 0.05


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


def matrix(outputs: int, inputs: int, scheme: str = "row", seed: int = 0) -> fp8.Fp8Matrix:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    stored, scales, _ = quantize(weight, scheme)
    return fp8.read_matrix("w", stored, scales, (outputs, inputs), None, Fp8Config())


@pytest.mark.parametrize("scheme", ["row", "matrix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_product_is_that_of_the_dequantized_numbers(
    scheme: str, dtype: torch.dtype, with_bias: bool
) -> None:
    torch.manual_seed(1)
    weight = matrix(48, 320, scheme)
    x = torch.randn(7, 320).to(dtype)
    x[3] *= 1e4  # a token of its own size loses nothing by its neighbours
    bias = torch.randn(48).to(dtype) if with_bias else None
    ours = Fp8Linear(weight, bias)(x)
    assert ours.dtype is dtype
    values, scales = fp8.quantize(x, 320)
    assert values.float().abs().amax(1).tolist() == [448.0] * 7
    plain = weight.dequantized().double()
    rounded = (values.double() * scales.double()) @ plain.T
    exact = x.double() @ plain.T
    if bias is not None:
        rounded, exact = rounded + bias, exact + bias
    close = 1e-5 if dtype is torch.float32 else 1e-2
    for row in range(7):
        assert error(ours[row].double(), rounded[row]) < close
        assert error(ours[row].double(), exact[row]) < ROUNDING


def test_rows_of_zeros_stay_zeros() -> None:
    assert not Fp8Linear(matrix(16, 32))(torch.zeros(3, 32)).any()


@pytest.fixture
def projections(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Three matrices of very different sizes, each with one scale of its own, and their numbers."""
    tensors, plain = {}, {}
    for i, (name, outputs) in enumerate((("q", 64), ("k", 32), ("v", 32))):
        weight = torch.randn(outputs, 96, generator=torch.Generator().manual_seed(i)) * 30**i
        stored, scale, plain[name] = quantize(weight, "matrix")
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = stored, scale
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, plain


def open_weights(path: Path, block: tuple[int, int] | None = None) -> CheckpointWeights:
    return CheckpointWeights(
        path, dtype=torch.float32, device=CPU, fp8=Fp8Config(block), keep_fp8=True
    )


def test_joined_projections_keep_the_scale_of_each(
    projections: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, plain = projections
    parts = [Projection("q", 64), Projection("k", 32), Projection("v", 32)]
    weights = open_weights(path)
    linear = load_linear(weights, TorchKernels(), parts, 96)
    weights.finish()
    assert isinstance(linear, Fp8Linear)
    assert weights.num_bytes == 128 * (96 + 4)
    x = torch.randn(5, 96)
    for ours, name in zip(linear(x).split([64, 32, 32], 1), "qkv", strict=True):
        assert error(ours, x @ plain[name].T) < ROUNDING


@pytest.mark.parametrize("size", [2, 4])
def test_the_ranks_have_the_parts_of_the_product(
    projections: tuple[Path, dict[str, torch.Tensor]], size: int
) -> None:
    path, plain = projections
    x, columns, total = torch.randn(5, 96), [], torch.zeros(5, 64)
    for rank in range(size):
        sharding = Sharding(rank, size)
        rows = load_linear(
            open_weights(path),
            TorchKernels(),
            [Projection("q", 64, sharding.even_shard(64, 0))],
            96,
        )
        part = load_row_parallel_linear(
            open_weights(path), TorchKernels(), "q", 96, 64, False, sharding
        )
        assert isinstance(rows, Fp8Linear)
        assert isinstance(part, Fp8Linear) == (96 // size % 16 == 0)
        columns.append(rows(x))
        total += part(x.chunk(size, 1)[rank].contiguous())
    expected = x @ plain["q"].T
    assert error(torch.cat(columns, 1), expected) < ROUNDING
    assert error(total, expected) < ROUNDING


def test_what_has_no_product_is_dequantized(tmp_path: Path) -> None:
    weight = torch.randn(30, 96)
    narrow, scale, plain = quantize(weight, "matrix")
    tensors = {"narrow.weight": narrow, "narrow.weight_scale": scale, "plain.weight": plain}
    tensors |= {"other.weight": plain.to(torch.float8_e5m2), "other.weight_scale": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    x = torch.randn(5, 96)
    for names in (["narrow"], ["narrow", "plain"], ["other"]):
        parts = [Projection(name, 30) for name in names]
        linear = load_linear(open_weights(tmp_path), TorchKernels(), parts, 96)
        assert not isinstance(linear, Fp8Linear)
        if "other" not in names:
            torch.testing.assert_close(linear(x), (x @ plain.T).repeat(1, len(names)))


def logits(path: Path, kept: bool, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    monkeypatch.setattr("minisrv.engine.rank_engine.keeps_fp8", lambda *args: kept)
    engine = open_engine(path)
    assert engine.placement.endswith("FP8 products" if kept else "dequantized from FP8")
    driver = StepDriver(engine)
    return driver.logits(prefills=[(driver.add(), IDS)])[0]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("scheme", ["matrix", "row", "compressed-matrix"])
def test_logits_are_those_of_transformers_with_rounded_activations(
    tmp_path: Path, architecture: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, plain = write_pair(tmp_path, architecture, scheme)
    model = AutoModelForCausalLM.from_pretrained(plain, attn_implementation="sdpa").eval()

    def round_input(module: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        rows = args[0].flatten(0, -2)
        values, scales = fp8.quantize(rows, rows.shape[1])
        return (values.float() * scales).view(args[0].shape)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(round_input)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0, -1]
    ours = logits(quantized, True, monkeypatch)
    # Where rounding in float32 moves a number to the next of e4m3 it would be more.
    assert error(ours, expected) < 0.01
    assert error(ours, logits(quantized, False, monkeypatch)) > 0.01


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("scheme", ["matrix", "row"])
def test_logits_are_near_those_of_the_dequantized_model(
    tmp_path: Path, architecture: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, _ = write_pair(tmp_path, architecture, scheme)
    kept, plain = (logits(quantized, kept, monkeypatch) for kept in (True, False))
    assert 0.01 < error(kept, plain) < 0.2


@pytest.mark.parametrize(
    ("inputs", "block", "shard", "group"),
    [
        (512, 128, None, 128),
        (512, 128, Shard(1, 256, 256), 128),
        (768, 128, Shard(1, 192, 192), 64),
        (768, 128, Shard(1, 0, 192), 128),
        (768, 128, Shard(0, 30, 50), 128),
        (500, 128, Shard(1, 416, 84), 32),
    ],
)
def test_a_part_that_begins_within_a_block_has_smaller_groups(
    inputs: int, block: int, shard: Shard | None, group: int
) -> None:
    torch.manual_seed(0)
    stored = torch.randn(100, inputs).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-100 // 48), -(-inputs // block))
    whole = (
        stored.float()
        * scale.repeat_interleave(48, 0)[:100].repeat_interleave(block, 1)[:, :inputs]
    )
    part, expected = stored, whole
    if shard is not None:
        part, expected = (x.narrow(shard.dim, shard.start, shard.length) for x in (stored, whole))
    read = fp8.read_matrix("w", part, scale, (100, inputs), shard, Fp8Config((48, block)))
    assert read.group == group
    assert can_multiply(read)
    assert torch.equal(read.dequantized(), expected)


def test_torch_takes_the_operands_on_a_gpu() -> None:
    """Torch checks types, shapes and strides of a product on CUDA without having one."""
    with FakeTensorMode():
        weight = fp8.Fp8Matrix(
            torch.empty(48, 256, dtype=torch.float8_e4m3fn, device="cuda"),
            torch.empty(48, 1, device="cuda"),
            256,
        )
        linear = Fp8Linear(weight)
        for num_tokens in (1, 2, 17, 300):
            for dtype in (torch.bfloat16, torch.float16):
                x = torch.empty(num_tokens, 256, dtype=dtype, device="cuda")
                values = torch.empty_like(x, dtype=torch.float8_e4m3fn)
                scales = torch.empty(num_tokens, 1, device="cuda")
                linear._quantize = lambda x, group, given=(values, scales): given
                out = linear(x)
                assert (out.shape, out.dtype) == ((num_tokens, 48), dtype)
                assert out.device.type == "cuda"


@pytest.mark.parametrize(
    ("device", "capability", "options", "dtype", "kept"),
    [
        ("cuda", (9, 0), {}, torch.bfloat16, True),
        ("cuda", (8, 9), {}, None, True),
        ("cuda", (8, 0), {}, torch.bfloat16, False),
        ("cuda", (9, 0), {"kernels": "torch"}, torch.bfloat16, False),
        ("cuda", (9, 0), {}, torch.float32, False),
        ("cpu", (9, 0), {}, torch.bfloat16, False),
    ],
)
def test_gpus_with_fp8_keep_the_matrices(
    device: str,
    capability: tuple[int, int],
    options: dict[str, Any],
    dtype: torch.dtype | None,
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert backends.keeps_fp8(ServerConfig(**options), torch.device(device), dtype) is kept
