"""The Triton kernels: right in the interpreter, and compiled for the GPUs they are meant for."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = Path(__file__).parent.parent.parent / "python" / "minisrv" / "engine" / "kernels"

# The interpreter is chosen when a kernel is defined: another process, so that no test is moved.
_COMPARE = """
import torch
from minisrv.engine.kernels.base import CacheSlots, QKNormWeights
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.kernels.triton_rotate import norm_rotate_store

torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
    for head_dim in (80,) if FEW else (16, 64, 80, 128):
        for with_norm in (False, True):
            num_heads, num_kv_heads, num_tokens, num_slots = 6, 2, 5, 40
            qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
            q_D, k_D = torch.rand(2, head_dim)
            rope = torch.randn(2, num_tokens, 1, head_dim)
            slots = torch.randperm(num_slots)[:num_tokens]
            results = []
            for function, to in (
                (norm_rotate_store, dtype), (TorchKernels().norm_rotate_store_, torch.float32)
            ):
                def at(tensor):
                    return tensor.to(dtype).to(to, copy=True)
                norm = QKNormWeights(at(q_D), at(k_D), 1e-6) if with_norm else None
                keys = torch.zeros(num_slots, num_kv_heads, head_dim, dtype=to)
                values = torch.zeros_like(keys)
                given = at(qkv)
                cache = CacheSlots(slots, keys, values)
                function(given, num_heads, norm, at(rope).unbind(0), cache)
                results.append((given, keys, values))
            for ours, expected in zip(*results, strict=True):
                torch.testing.assert_close(ours.float(), expected, rtol=tolerance, atol=tolerance)
"""

# Triton's interpreter rounds to e4m3 wrongly near powers of two: torch's rounding stands in.
ROUND_AS_TORCH = """
import numpy as np
import torch
from triton.runtime import interpreter

convert = interpreter._convert_float
def rounded(data, given, wanted, mode):
    if str(wanted) != "fp8e4nv" or str(given) != "fp32":
        return convert(data, given, wanted, mode)
    assert np.abs(data).max() <= 448
    return torch.from_numpy(data).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
interpreter._convert_float = rounded
"""

_COMPARE_FP8 = """
from minisrv.engine.kernels.base import CacheSlots, QKNormWeights
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.kernels.triton_rotate import norm_rotate_store

torch.manual_seed(0)
for head_dim in (80,) if FEW else (16, 80, 128):
    for with_norm in (False, True):
        qkv = torch.randn(5, 10, head_dim)
        qkv[0, :, ::3] *= 1e4
        norm = QKNormWeights(*torch.rand(2, head_dim) * 200, 1e-6) if with_norm else None
        rope = torch.randn(2, 5, 1, head_dim).unbind(0)
        slots = torch.randperm(40)[:5]
        results = []
        for function in (norm_rotate_store, TorchKernels().norm_rotate_store_):
            keys, values = torch.zeros(2, 40, 2, head_dim, dtype=torch.float8_e4m3fn)
            given = qkv.clone()
            function(given, 6, norm, rope, CacheSlots(slots, keys, values))
            results.append((given, keys.float(), values.float()))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours[:, :6], expected[:, :6], rtol=2e-5, atol=2e-3)
        for ours, expected in zip(results[0][1:], results[1][1:], strict=True):
            assert expected.abs().max() == 448
            # A number that lies between two of e4m3 may go to either.
            assert (ours != expected).float().mean() < 1e-3
            torch.testing.assert_close(ours, expected, rtol=0.13, atol=2e-3)
"""

_COMPARE_PRODUCT = """
from minisrv.engine import fp8
from minisrv.engine.kernels import triton_fp8
from minisrv.engine.layers.fp8_linear import Fp8Linear, can_multiply
from minisrv.checkpoint.model_config import Fp8Config
from minisrv.engine.parallel.shard import Shard

torch.manual_seed(0)
for num_tokens, outputs, inputs, block, shard in (
    (1, 100, 256, (48, 128), None),
    (5, 64, 200, (64, 64), None),
    (40, 100, 384, (128, 128), Shard(1, 192, 192)),
    (5, 300, 512, (128, 256), Shard(0, 30, 200)),
    (130, 140, 96, (32, 32), None),
)[: 2 if FEW else None]:
    stored = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-outputs // block[0]), -(-inputs // block[1])) * 0.01
    part = stored
    if shard is not None:
        part = stored.narrow(shard.dim, shard.start, shard.length).contiguous()
    matrix = fp8.read_matrix("w", part, scale, stored.shape, shard, Fp8Config(block))
    assert can_multiply(matrix)
    matrix = fp8.join([matrix, matrix])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        x = torch.randn(num_tokens, part.shape[1]).to(dtype)
        x[0, ::7] *= 1e3
        x[-1] = 0
        ours, theirs = (f.quantize(x, matrix.group) for f in (triton_fp8, fp8))
        assert torch.equal(ours[0].view(torch.uint8), theirs[0].view(torch.uint8))
        assert torch.equal(ours[1], theirs[1])
        scales = ours[1].repeat_interleave(matrix.group, 1)[:, : x.shape[1]]
        expected = (ours[0].double() * scales) @ matrix.dequantized().double().T
        bias = torch.randn(len(matrix.values_OI)).to(dtype)
        product = Fp8Linear(matrix, bias)(x)
        assert product.dtype is dtype
        expected += bias
        torch.testing.assert_close(
            product.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max()
        )
        exact = x.double() @ matrix.dequantized().double().T + bias
        assert (product - exact).norm() / exact.norm() < 0.05
"""

_COMPARE_PENALTIES = """
import torch
from minisrv.engine.kernels.base import PenaltyColumns
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.kernels.triton_penalize import penalize

torch.manual_seed(0)
for vocab_size in (1, 100, 5000):
    counts = (torch.rand(4, vocab_size) * 12 - 8).to(torch.int16).clamp(min=-1)
    counts[0, -1], counts[2, 0] = 32767, 0
    columns = PenaltyColumns(
        torch.tensor([2, 0, 3]), torch.tensor([0, 2, 1]), torch.rand(3, 3) * 2 + 0.01
    )
    padded = torch.randn(5, vocab_size + 3) * 5
    padded[:, ::5] = -torch.inf
    ours, theirs = padded.clone(), padded.clone()
    penalize(ours[:, :vocab_size], counts, columns)
    TorchKernels().penalize_(theirs[:, :vocab_size], counts, columns)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    assert torch.equal(ours[[1, 4]], padded[[1, 4]])
    assert torch.equal(ours[:, vocab_size:], padded[:, vocab_size:])
"""

_COMPARE_MASKS = """
import torch
from minisrv.engine.kernels.torch_native import mask_logits_
from minisrv.engine.kernels.triton_mask import mask_logits

torch.manual_seed(0)
for vocab_size in (1, 31, 97, 3000):
    masks = torch.randint(-(2**31), 2**31, (3, -(-vocab_size // 32) + 1), dtype=torch.int32)
    masks[1], masks[2] = -1, 0
    samples = torch.tensor([2, 0, 3], dtype=torch.int32)
    padded = torch.randn(5, vocab_size + 3)
    ours, theirs = padded.clone(), padded.clone()
    mask_logits(ours[:, :vocab_size], samples, masks)
    mask_logits_(theirs[:, :vocab_size], samples, masks)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, padded)
"""

_COMPILE = """
from benchmark.micro import triton_resources as resources
from benchmark.micro.triton_launches import MEMORY, all_launches

found = {launch.name: (launch, resources.measure(launch)) for launch in all_launches()}
for name, (launch, needs) in found.items():
    assert ".target sm_90" in needs.ptx
    assert needs.spilled == 0, name
    assert needs.programs > 0, name
    if launch.limit != MEMORY:
        continue
    assert needs.occupancy >= 0.5, (name, needs.occupancy)
    if launch.bytes_per_stage:
        assert "cp.async" in needs.ptx, name
        assert needs.in_flight * needs.programs >= resources.BYTES_TO_FLY, name
for name, rows in (("gate_up", 64), ("gate_up", 128), ("down", 64), ("down", 128)):
    assert "wgmma" in found[f"{name}, {rows} rows"][1].ptx
print("compiled")
"""

_COMPILE_OTHERS = """
from itertools import chain
from benchmark.micro.triton_launches import (
    expert_launches, rotate_launches, sampling_launches, small_batch_launches
)
from benchmark.micro.triton_resources import compile_ahead

for launch in chain(
    sampling_launches("*bf16"), sampling_launches("*fp16"), expert_launches("*fp16"),
    expert_launches("*fp32"), rotate_launches("*fp16"), small_batch_launches("*fp32"),
):
    built = compile_ahead(launch)
    assert built.asm["cubin"]
    assert built.metadata.shared <= 227 * 1024, built.metadata.shared  # of an SM, for one program
print("compiled")
"""


def run(code: str, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        cwd=KERNELS.parents[3],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_COMPARISONS = {
    "rotate": _COMPARE,
    "rotate, fp8": _COMPARE_FP8,
    "product": _COMPARE_PRODUCT,
    "penalties": _COMPARE_PENALTIES,
    "masks": _COMPARE_MASKS,
}


def compare(code: str, *, few: bool) -> None:
    """Run comparisons in the interpreter, with which each kernel is prepared once."""
    faster = "from tests.engine.run_in_triton_interpreter.conftest import prepared_once\n"
    faster += "patches = prepared_once()\npatches.__enter__()\n"
    code = f"FEW = {few}\n{faster}{ROUND_AS_TORCH}{code}\nprint('all alike')\n"
    assert run(code, TRITON_INTERPRET="1") == "all alike\n"


def test_the_interpreted_kernels_do_what_torch_does() -> None:
    compare("".join(_COMPARISONS.values()), few=True)


@pytest.mark.soak
@pytest.mark.parametrize("name", _COMPARISONS)
def test_the_interpreted_kernels_do_what_torch_does_in_all_sizes(name: str) -> None:
    compare(_COMPARISONS[name], few=False)


def run_interpreted_tests(names: Sequence[str], marker: str) -> None:
    folder = Path(__file__).parent / "run_in_triton_interpreter"
    arguments = [*(f"{folder}/{name}.py" for name in names), "-m", marker]
    code = f"import pytest; raise SystemExit(pytest.main({arguments}))"
    assert " passed" in run(code, TRITON_INTERPRET="1")


def test_the_interpreted_kernels_pass_the_short_ones_of_their_tests() -> None:
    run_interpreted_tests(["launches", "moe", "sample_listed", "small_batch"], "not soak")


@pytest.mark.soak
@pytest.mark.parametrize("name", ["launches", "moe", "sample", "sample_listed", "small_batch"])
def test_the_interpreted_kernels_pass_the_long_ones_of_their_tests(name: str) -> None:
    run_interpreted_tests([name], "soak")


def test_the_kernels_have_what_they_need_on_hopper() -> None:
    assert run(_COMPILE) == "compiled\n"


@pytest.mark.soak
def test_the_kernels_compile_for_the_other_dtypes() -> None:
    assert run(_COMPILE_OTHERS) == "compiled\n"


def kernels() -> Iterator[ast.FunctionDef]:
    """The functions that Triton compiles."""
    for path in sorted(KERNELS.glob("triton_*.py")):
        module = ast.parse(path.read_text())
        for node in module.body:
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list
            ):
                yield node


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def loads(kernel: ast.FunctionDef) -> list[ast.Call]:
    return [call for call in calls(kernel) if ast.unparse(call.func) == "tl.load"]


@cache
def launches() -> dict[str, list[ast.Call]]:
    """By kernel."""
    found: dict[str, list[ast.Call]] = {}
    for path in KERNELS.glob("triton_*.py"):
        for call in calls(ast.parse(path.read_text())):
            if isinstance(call.func, ast.Subscript):
                found.setdefault(ast.unparse(call.func.value), []).append(call)
    return found


def test_every_kernel_waits_before_anything_else() -> None:
    """With --programmatic-launch it is launched while the kernel before it still runs."""
    found = [kernel for kernel in kernels() if kernel.name in launches()]
    assert len(found) > 15
    for kernel in found:
        start = 0 if ast.get_docstring(kernel) is None else 1
        assert ast.unparse(kernel.body[start]) == "begin(PDL)", kernel.name
        for launch in launches()[kernel.name]:
            assert "**dependent()" in ast.unparse(launch), kernel.name


def test_what_a_masked_load_leaves_out_is_defined() -> None:
    """The interpreter reads zeros there, a GPU anything."""
    masked = [
        load
        for kernel in kernels()
        for load in loads(kernel)
        if len(load.args) + len(load.keywords) > 1
    ]
    assert len(masked) > 20
    assert not [ast.unparse(load) for load in masked if len(load.args) != 3]


def test_no_variant_is_compiled_for_some_numbers_of_tokens() -> None:
    """Triton would compile one for 1 and one for multiples of 16, at any step while serving."""
    constant = {"num_outputs", "num_words"}
    counts, free = set(), set()
    for kernel in kernels():
        if kernel.name not in launches():
            continue
        # What is loaded is on the device, where Triton cannot see its value.
        loaded = {ast.unparse(load.args[0]) for load in loads(kernel)}
        arguments = {argument.arg for argument in kernel.args.args}
        names = {name for name in arguments if name.startswith("num_")}
        counts |= {(kernel.name, name) for name in names - loaded - constant}
        given = {
            name
            for decorator in kernel.decorator_list
            for keyword in getattr(decorator, "keywords", ())
            if keyword.arg == "do_not_specialize"
            for name in ast.literal_eval(keyword.value)
        }
        assert given <= arguments  # Triton ignores others
        free |= {(kernel.name, name) for name in given}
    products = {"_project_heads", "_gate_and_up", "_add_product", "_grouped_product"}
    products |= {"_multiply_router", "_choose_experts", "_add_experts"}
    found = {("_place", "num_pairs"), ("_place", "num_tiles")}
    found |= {(kernel, "num_tokens") for kernel in products}
    assert counts == found
    assert free == found | {("_penalize", "factor_stride")}
