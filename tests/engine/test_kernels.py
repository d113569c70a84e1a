"""The compiled operators against plain torch in float32."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from minisrv.engine.kernels import compiler
from minisrv.engine.kernels.base import CacheSlots, QKNormWeights
from minisrv.engine.kernels.cpu import (
    ATTENTION_HEAD_DIMS,
    DTYPES,
    CpuKernels,
    load_cpu_kernels,
)
from minisrv.engine.kernels.torch_native import TorchKernels

EPS = 1e-6
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
REFERENCE = TorchKernels()

pytestmark = pytest.mark.skipif(
    compiler.find_compiler() is None, reason="there is no C++ compiler here"
)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    assert isinstance(request.param, torch.dtype)
    return request.param


@pytest.fixture
def kernels(dtype: torch.dtype) -> CpuKernels:
    loaded = load_cpu_kernels(dtype)
    assert loaded is not None, "the compiler is here, but cpu.cpp does not compile"
    return loaded


class Cached(NamedTuple):
    """Operators with the dtype that they compute in and that of the cache."""

    kernels: CpuKernels
    dtype: torch.dtype
    cache_dtype: torch.dtype


@pytest.fixture(params=DTYPES, ids=lambda pair: "-in-".join(str(dtype)[6:] for dtype in pair))
def cached(request: pytest.FixtureRequest) -> Cached:
    torch.manual_seed(0)
    loaded = load_cpu_kernels(*request.param)
    assert loaded is not None
    return Cached(loaded, *request.param)


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 16), (3, 100), (300, 256)])
@pytest.mark.parametrize("with_delta", [False, True])
def test_add_rms_norm(
    kernels: CpuKernels, dtype: torch.dtype, shape: tuple[int, int], with_delta: bool
) -> None:
    x, delta = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.rand(shape[1]).to(dtype)
    ours, theirs = x.clone(), x.clone()
    given = delta if with_delta else None
    normed = kernels.add_rms_norm_(ours, given, weight, EPS)
    expected = REFERENCE.add_rms_norm_(theirs, given, weight, EPS)
    assert torch.equal(ours, theirs)
    assert_close(normed, expected)


@pytest.mark.parametrize("shape", [(1, 32), (5, 74), (200, 1024)])
def test_silu_and_mul(kernels: CpuKernels, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up = (torch.randn(shape) * 10).to(dtype)
    assert_close(kernels.silu_and_mul(gate_up), REFERENCE.silu_and_mul(gate_up.float()))


def test_silu_of_extreme_values_is_finite(kernels: CpuKernels, dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e30, -200.0, -0.0, 0.0, 200.0, 1e30])
    gate_up = torch.cat([gate, torch.ones(6)]).to(dtype)[None]
    assert_close(kernels.silu_and_mul(gate_up), REFERENCE.silu_and_mul(gate_up.float()))


@pytest.mark.parametrize("head_dim", [8, 16, 32, 40, 64, 128])
@pytest.mark.parametrize("num_tokens", [1, 7, 200])
@pytest.mark.parametrize("with_norm", [False, True])
def test_norm_rotate_store(cached: Cached, head_dim: int, num_tokens: int, with_norm: bool) -> None:
    kernels, dtype, cache_dtype = cached
    num_heads, num_kv_heads, num_slots = 6, 2, 300
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    norm = QKNormWeights(torch.rand(head_dim), torch.rand(head_dim), EPS) if with_norm else None
    rope_rows = torch.randn(num_tokens, 1, head_dim), torch.randn(num_tokens, 1, head_dim)
    slots = torch.randperm(num_slots)[:num_tokens]
    results = []
    for implementation, to, stored in (
        (kernels, dtype, cache_dtype),
        (REFERENCE, torch.float32, torch.float32),
    ):
        # Both get what bfloat16 holds; the reference computes on with it in float32.
        rounded = [t.to(dtype).to(to, copy=True) for t in (qkv, *rope_rows)]
        weights = norm and QKNormWeights(norm.q_D.to(dtype).to(to), norm.k_D.to(dtype).to(to), EPS)
        keys = torch.zeros(num_slots, num_kv_heads, head_dim, dtype=stored)
        values = torch.zeros_like(keys)
        cache = CacheSlots(slots, keys, values)
        implementation.norm_rotate_store_(
            rounded[0], num_heads, weights, (rounded[1], rounded[2]), cache
        )
        results.append((rounded[0], keys, values))
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected)


def test_argmax_takes_the_first_of_the_greatest(kernels: CpuKernels) -> None:
    logits = torch.randint(-50, 50, (40, 3001)).float()
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert kernels.argmax(logits).tolist() == expected
    logits[:, 5:] = -torch.inf
    logits[:, :5] = -torch.inf
    assert kernels.argmax(logits).tolist() == [0] * 40
    logits[3, 700] = logits[3, 900] = torch.nan
    assert kernels.argmax(logits)[3] == 700


@pytest.mark.parametrize("head_dim", ATTENTION_HEAD_DIMS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("shared_len", [0, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (12, 2), (40, 1)])
def test_decode_attention(
    cached: Cached,
    head_dim: int,
    page_size: int,
    shared_len: int,
    num_heads: int,
    num_kv_heads: int,
) -> None:
    kernels, dtype, cache_dtype = cached
    kv_lens = [shared_len + n for n in (1, 15, 16, 17, 90, 200)]
    columns = -(-max(kv_lens) // page_size)
    num_pages = columns * len(kv_lens)
    keys, values = torch.randn(2, num_pages, page_size, num_kv_heads, head_dim).to(cache_dtype)
    # A row of the table is no index of the step, and pages that are not in use hold a NaN.
    table = torch.randperm(num_pages).int().view(-1, columns)
    rows = torch.randperm(len(kv_lens)).int()
    table[:, : shared_len // page_size] = table[0, : shared_len // page_size].clone()
    padded = torch.randn(len(kv_lens), num_heads + 3, head_dim).to(dtype)
    q = padded[:, :num_heads]
    expected = []
    for i, (row, length) in enumerate(zip(rows.tolist(), kv_lens, strict=True)):
        of_row = table[row].long()
        k, v = (x[of_row].flatten(0, 1)[:length].transpose(0, 1).float() for x in (keys, values))
        query = q[i].view(num_kv_heads, -1, head_dim).float()
        expected.append(F.scaled_dot_product_attention(query, k, v).reshape(num_heads, head_dim))
    used = torch.zeros(num_pages, page_size, dtype=torch.bool)
    for row, length in zip(rows.tolist(), kv_lens, strict=True):
        slots = torch.arange(length)
        used[table[row][slots // page_size].long(), slots % page_size] = True
    keys[~used] = values[~used] = torch.nan
    ours = torch.empty(len(kv_lens), num_heads, head_dim, dtype=dtype)
    lens = torch.tensor(kv_lens, dtype=torch.int32)
    kernels.decode_attention(q, (keys, values), table, rows, lens, shared_len, ours)
    assert_close(ours, torch.stack(expected))


@pytest.mark.parametrize("num_kv_heads", [1, 3, 8])
def test_decode_attention_is_the_same_for_any_threads(num_kv_heads: int) -> None:
    """However the heads of each batch are divided among them."""
    kernels = load_cpu_kernels(torch.float32, torch.bfloat16)
    assert kernels is not None
    most, page_size, head_dim, length = 9, 16, 64, 300
    columns = -(-length // page_size)
    shape = most * columns, page_size, num_kv_heads, head_dim
    cache = torch.randn(2, *shape).bfloat16()
    table = torch.randperm(most * columns).int().view(most, columns)
    lens = torch.randint(1, length, (most,), dtype=torch.int32)
    rows, q = torch.arange(most, dtype=torch.int32), torch.randn(most, 2 * num_kv_heads, head_dim)
    keys_values = cache[0], cache[1]
    kernels.num_threads, expected = 1, torch.empty_like(q)
    kernels.decode_attention(q, keys_values, table, rows, lens, 0, expected)
    for batch in range(1, most + 1):
        for kernels.num_threads in range(1, 6):
            out = torch.full_like(q[:batch], torch.nan)
            kernels.decode_attention(
                q[:batch], keys_values, table, rows[:batch], lens[:batch], 0, out
            )
            assert torch.equal(out, expected[:batch])


@pytest.mark.parametrize("head_dim", ATTENTION_HEAD_DIMS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize(
    ("start", "length"),
    [
        *((0, 1), (0, 77), (16, 3), (100, 33)),
        *(pytest.param(*long, marks=pytest.mark.soak) for long in ((1023, 70), (2000, 150))),
    ],
)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (12, 2), (72, 1)])
def test_prefill_attention(
    cached: Cached,
    head_dim: int,
    page_size: int,
    start: int,
    length: int,
    num_heads: int,
    num_kv_heads: int,
) -> None:
    kernels, dtype, cache_dtype = cached
    end = start + length
    num_pages = -(-end // page_size)
    keys, values = torch.randn(2, num_pages, page_size, num_kv_heads, head_dim).to(cache_dtype)
    page_row = torch.randperm(num_pages).int()
    q = torch.randn(length, num_heads + 3, head_dim).to(dtype)[:, :num_heads]
    k, v = (x[page_row.long()].flatten(0, 1)[:end].transpose(0, 1) for x in (keys, values))
    visible = torch.arange(end) <= torch.arange(start, end)[:, None]
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1).float(), k.float(), v.float(), attn_mask=visible, enable_gqa=True
    ).transpose(0, 1)
    last_used = (end - 1) % page_size + 1
    keys[page_row[-1], last_used:] = values[page_row[-1], last_used:] = torch.nan
    ours = torch.empty(length, num_heads, head_dim, dtype=dtype)
    kernels.prefill_attention(q, (keys, values), page_row, start, ours)
    assert_close(ours, expected)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", ATTENTION_HEAD_DIMS)
@pytest.mark.parametrize("length", [1, 30, 200])
def test_a_prompt_gives_the_bits_of_decodes_wherever_its_chunks_begin(
    cache_dtype: torch.dtype, head_dim: int, length: int
) -> None:
    """So a request that is resumed, or finds its prefix in the cache, goes on as it would have."""
    kernels = load_cpu_kernels(torch.float32, cache_dtype)
    assert kernels is not None
    num_pages = -(-length // 16)
    keys, values = torch.randn(2, num_pages, 16, 2, head_dim).to(cache_dtype)
    cache = keys, values
    table = torch.randperm(num_pages).int()
    q = torch.randn(length, 6, head_dim)
    whole, part, decode = torch.empty_like(q), torch.empty_like(q), torch.empty(1, 6, head_dim)
    kernels.prefill_attention(q, cache, table, 0, whole)
    start = length * 2 // 3
    kernels.prefill_attention(q[start:], cache, table, start, part[start:])
    assert torch.equal(whole[start:], part[start:])
    row, kv_len = torch.zeros(1, dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    kernels.decode_attention(q[-1:], cache, table[None], row, kv_len, 0, decode)
    assert torch.equal(whole[-1:], decode)


def test_without_a_compiler_there_is_one_warning_and_no_library(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert load_cpu_kernels(torch.float32) is None
    assert len(caplog.records) == 1
    assert "no C++ compiler" in caplog.text


def test_a_source_that_does_not_compile_is_reported_with_its_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("int main() { return nothing_of_that_name; }")
    assert compiler.load_library(source) is None
    assert "nothing_of_that_name" in caplog.text
    assert not list((tmp_path / "minisrv").iterdir())


def test_a_folder_that_cannot_be_written_does_no_harm_and_nothing_stays_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    source = tmp_path / "fine.cpp"
    source.write_text('extern "C" int seven() { return 7; }')
    steps: list[tuple[object, ...]] = []
    with compiler.reporting_to(lambda *step: steps.append(step)):
        library = compiler.load_library(source)
    assert library is not None
    assert library.seven() == 7
    assert steps[0] == ("compile fine.cpp", 0.0, 0, "s")
    assert steps[-1] == ("compile fine.cpp", 1.0, 0, "s")
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main() { return nothing_of_that_name; }")
    assert compiler.load_library(broken) is None
    assert not list((tmp_path / "temporary").iterdir())


def test_a_second_start_compiles_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "fine.cpp"
    source.write_text('extern "C" int seven() { return 7; }')
    assert compiler.load_library(source) is not None
    (built,) = (tmp_path / "minisrv").iterdir()
    written = built.stat().st_mtime_ns
    assert compiler.load_library(source) is not None
    assert built.stat().st_mtime_ns == written


def test_compiled_operators_and_torch_share_their_threads() -> None:
    """Two OpenMP libraries in a process would have twice the threads, and each wait for its own."""
    code = (
        "import torch\n"
        "from minisrv.engine.kernels.cpu import load_cpu_kernels\n"
        "load_cpu_kernels(torch.float32)\n"
        "found = {l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l}\n"
        "assert len(found) == 1, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
