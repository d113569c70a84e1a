"""A step's words: what the device makes of them is what the host's own tables say."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minisrv.engine.forward_batch import ForwardBatch, Penalties
from minisrv.engine.graph_shapes import CHUNKS, GraphShape
from minisrv.engine.kernels.base import PenaltyColumns
from minisrv.engine.page_table import PageTable, token_positions
from minisrv.engine.sampling.device_columns import TokenBiases
from minisrv.engine.step_buffer import StepBuffer, StepLimits, StepTensors
from tests.support.device_parts import expand
from tests.support.step_driver import sampling_columns

CPU = torch.device("cpu")
NUM_ROWS, MAX_LEN = 10, 300


def random_step(rng: np.random.Generator, table: PageTable, num_writes: int) -> ForwardBatch:
    """Decodes and chunks, with page writes that are in `table` already."""
    num_decodes, num_prefills = (int(n) for n in rng.integers(0, 5, 2))
    num_prefills += num_decodes + num_prefills == 0
    size = num_decodes + num_prefills
    query_lens = np.ones(size, np.int32)
    query_lens[num_decodes:] = rng.integers(1, 70, num_prefills)
    places = rng.permutation(table.pages.size)[:num_writes].astype(np.int32)
    page_rows, page_columns = np.divmod(places, np.int32(table.pages.shape[1]))
    page_ids = rng.integers(0, 1000, num_writes).astype(np.int32)
    table.pages[page_rows, page_columns] = page_ids
    samples = np.flatnonzero(rng.random(size) < 0.7).astype(np.int32)
    samples = np.union1d(np.arange(num_decodes, dtype=np.int32), samples)
    pairs = [(i, int(rng.integers(100))) for i in range(len(samples)) if rng.random() < 0.3]
    rows = rng.permutation(NUM_ROWS)[:size].astype(np.int32)
    return ForwardBatch(
        step_id=1,
        num_decodes=num_decodes,
        rows=rows,
        query_lens=query_lens,
        start_positions=rng.integers(0, MAX_LEN - 70, size).astype(np.int32),
        prefill_ids=rng.integers(0, 100, query_lens[num_decodes:].sum()).astype(np.int32),
        page_rows=page_rows,
        page_columns=page_columns,
        page_ids=page_ids,
        sample_indices=samples,
        sampling=sampling_columns(
            len(samples),
            temperature=rng.random(len(samples)),
            seeds=rng.integers(-(2**62), 2**62, len(samples)),
            suppress=pairs,
        ),
        penalties=random_penalties(rng, rows[samples]) if rng.random() < 0.5 else None,
    )


def random_penalties(rng: np.random.Generator, rows: Any) -> Penalties:
    """For some of the samples, which are in `rows`; and biases of some tokens."""
    samples = np.flatnonzero(rng.random(rows.size) < 0.4).astype(np.int32)
    biased = rng.integers(0, rows.size, 3 * bool(rows.size)).astype(np.int32)
    none = np.empty(0, np.int32)
    return Penalties(
        samples=samples,
        rows=rows[samples],
        presence=rng.random(samples.size, np.float32),
        frequency=rng.random(samples.size, np.float32),
        repetition=rng.random(samples.size, np.float32),
        begin_rows=none,
        begin_lens=none,
        begin_prompt_lens=none,
        begin_ids=none,
        bias_samples=biased,
        bias_ids=np.arange(biased.size, dtype=np.int32),
        bias_values=rng.random(biased.size, np.float32),
    )


def check(step_size: int, padded: int, batch: ForwardBatch, table: PageTable, t: Any) -> None:
    """Against the tables of the host; `padded` sequences of padding follow the decodes."""
    assert np.array_equal(t.page_table[:NUM_ROWS].numpy(), table.pages)
    positions = token_positions(batch)
    size = len(positions)
    assert np.array_equal(t.positions_T[:size].numpy(), positions)
    assert np.array_equal(t.slots_T[:size].numpy(), table.slots(batch, positions))
    n = batch.num_decodes
    assert torch.equal(t.ids_T[:n], t.last_token[batch.rows[:n]])
    assert np.array_equal(t.ids_T[n:size].numpy(), batch.prefill_ids)
    starts = t.words["page_starts"].tolist()
    kv_lens = batch.start_positions + batch.query_lens
    for i, (row, kv_len) in enumerate(zip(batch.rows, kv_lens, strict=True)):
        pages = t.pages[starts[i] : starts[i + 1]].tolist()
        assert pages == table.pages[row, : -(-kv_len // table.page_size)].tolist()
        last = int(t.words["last_page_lens"][i])
        assert (len(pages) - 1) * table.page_size + last == kv_len
    assert t.ids_T[size : size + padded].tolist() == [0] * padded
    assert t.positions_T[size : size + padded].tolist() == [0] * padded
    spare = 1000 * table.page_size
    assert t.slots_T[size : size + padded].tolist() == [spare] * padded
    assert step_size == len(batch.rows) + padded
    check_sampling(batch, padded, t)


def check_sampling(batch: ForwardBatch, padded: int, t: Any) -> None:
    samples, size = batch.sample_indices, batch.sample_indices.size
    columns = t.columns(size + padded, torch.empty(0))
    for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "choices"):
        ours = getattr(columns, f"{name}_S").numpy()
        assert np.array_equal(ours[:size], getattr(batch.sampling, name))
    assert not columns.temperature_S[size:].any()
    ends = np.cumsum(batch.query_lens)
    assert t.words["sample_tokens"][:size].tolist() == (ends - 1)[samples].tolist()
    new_positions = (batch.start_positions + batch.query_lens)[samples]
    assert columns.positions_S[:size].tolist() == new_positions.tolist()
    rows = t.words["sample_rows"][: size + padded].tolist()
    assert rows == batch.rows[samples].tolist() + [NUM_ROWS] * padded
    biases, expected = columns.biases, TokenBiases.of_step(batch.sampling, batch.penalties)
    count = int(biases.count)
    assert biases.samples_P[:count].tolist() == expected.samples.tolist()
    assert biases.ids_P[:count].tolist() == expected.ids.tolist()
    assert biases.values_P[:count].tolist() == expected.values.tolist()
    check_penalties(batch, padded, columns.penalties.columns)


def check_penalties(batch: ForwardBatch, padded: int, columns: PenaltyColumns) -> None:
    size = batch.sample_indices.size
    factors = np.zeros((3, size + padded), np.float32)
    factors[0] = 1
    given = batch.penalties
    if given is not None:
        for i, sample in enumerate(given.samples):
            factors[:, sample] = given.repetition[i], given.frequency[i], given.presence[i]
    assert np.array_equal(columns.factors_3E.numpy(), factors)
    assert columns.samples_E.tolist() == list(range(size + padded))
    assert columns.rows_E[:size].tolist() == batch.rows[batch.sample_indices].tolist()


def check_random_steps(expand: Any, seed: int, page_size: int) -> None:
    """Steps one after the other on the same tensors, so that each finds another's leavings."""
    rng = np.random.default_rng(seed)
    limits = StepLimits(NUM_ROWS, 300, MAX_LEN, page_size)
    tensors = StepTensors(limits, CPU, spare_page=1000)
    tensors.last_token[:NUM_ROWS] = torch.randint(1, 100, (NUM_ROWS,))
    buffer = StepBuffer(limits, tensors)
    table = PageTable(NUM_ROWS, MAX_LEN, page_size)
    tensors.page_table[:NUM_ROWS] = 0
    for step_id in range(8):
        most = table.pages.size if step_id == 3 else limits.num_writes // 2
        batch = random_step(rng, table, int(rng.integers(0, most + 1)))
        alone = batch.num_decodes == batch.rows.size
        padded_to = int(rng.integers(batch.num_decodes, NUM_ROWS + 1)) if alone else 0
        step = buffer.send(batch, GraphShape(padded_to) if padded_to else None)
        expand(tensors, limits, step.num_decodes + step.num_prefills)
        padded = max(0, padded_to - batch.rows.size)
        check(step.num_decodes + step.num_prefills, padded, batch, table, tensors)
        buffer.mark_launched()


@pytest.mark.parametrize("seed", range(10))
def test_a_step_with_chunks_that_is_padded_has_the_same_entries_between_the_padding(
    seed: int,
) -> None:
    rng, num_rows, page_size = np.random.default_rng(seed), NUM_ROWS + CHUNKS, 4
    limits = StepLimits(num_rows, 400, MAX_LEN, page_size)
    plain, padded = (StepTensors(limits, CPU, spare_page=1000) for _ in range(2))
    buffers = StepBuffer(limits, plain), StepBuffer(limits, padded)
    for tensors in (plain, padded):
        tensors.page_table[:num_rows] = torch.arange(num_rows * limits.max_pages).view(num_rows, -1)
        tensors.last_token[:num_rows] = torch.arange(1, num_rows + 1)
    for _ in range(8):
        batch = random_step(rng, PageTable(num_rows, MAX_LEN, page_size), 0)
        n, num_chunks = batch.num_decodes, batch.rows.size - batch.num_decodes
        if not num_chunks:
            continue
        chunk_tokens = batch.prefill_ids.size + int(rng.choice([0, 0, 1, 60]))
        shape = GraphShape(int(rng.choice([n, NUM_ROWS])), chunk_tokens)
        assert shape.fits(batch)
        steps = buffers[0].send(batch), buffers[1].send(batch, shape)
        for step, tensors in zip(steps, (plain, padded), strict=True):
            expand(tensors, limits, step.num_decodes + step.num_prefills)
        assert steps[1].num_tokens == shape.num_tokens
        assert steps[1].num_samples == steps[0].num_samples
        tokens = [*range(n), *range(shape.num_decodes, shape.num_decodes + batch.prefill_ids.size)]
        check_tokens(plain, padded, tokens, shape, 1000 * page_size)
        check_sequences(plain, padded, n, num_chunks, shape)
        samples = batch.sample_indices.size
        for name in ("sample_rows", "new_positions", "temperature", "seeds"):
            values = padded.words[name][: shape.num_sequences].tolist()
            filler = num_rows if name == "sample_rows" else 0
            assert values[:samples] == plain.words[name][:samples].tolist()
            assert values[samples:] == [filler] * (shape.num_sequences - samples)
        places = padded.words["sample_tokens"][: shape.num_sequences].tolist()
        at = plain.words["sample_tokens"][:samples].tolist()
        assert places == [tokens[i] for i in at] + [0] * (shape.num_sequences - samples)


def check_tokens(
    plain: Any, padded: Any, tokens: list[int], shape: GraphShape, spare_slot: int
) -> None:
    """`tokens` are the places of a step's tokens between the padding."""
    for name in ("ids_T", "positions_T", "slots_T"):
        expected = getattr(plain, name)[: len(tokens)]
        assert torch.equal(getattr(padded, name)[tokens], expected), name
    others = sorted(set(range(shape.num_tokens)) - set(tokens))
    assert padded.ids_T[others].tolist() == [0] * len(others)
    assert (padded.slots_T[others] // 4 == spare_slot // 4).all()
    chunk = [i for i in others if i >= shape.num_decodes]
    assert padded.positions_T[chunk].tolist() == list(range(len(chunk)))


def check_sequences(plain: Any, padded: Any, n: int, num_chunks: int, shape: GraphShape) -> None:
    """The pages and lengths of each sequence, and of the chunks how many tokens they have."""
    places = [*range(n), *range(shape.num_decodes, shape.num_decodes + num_chunks)]
    for i, place in enumerate(places):
        pages = [
            t.pages[slice(*t.words["page_starts"][at : at + 2].tolist())].tolist()
            for t, at in ((plain, i), (padded, place))
        ]
        assert pages[0] == pages[1]
        assert plain.words["last_page_lens"][i] == padded.words["last_page_lens"][place]
    starts = padded.words["prefill_query_starts"][: CHUNKS + 1].tolist()
    assert (
        starts[: num_chunks + 1] == plain.words["prefill_query_starts"][: num_chunks + 1].tolist()
    )
    assert starts[num_chunks + 1 :] == [shape.num_chunk_tokens] * (CHUNKS - num_chunks)
    ends = padded.words["page_starts"][shape.num_decodes + num_chunks + 1 : shape.num_sequences + 1]
    assert len(set(ends.tolist())) == 1  # the empty chunks have no pages


@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
@pytest.mark.parametrize("seed", range(10))
def test_positions_slots_and_pages_are_those_of_the_host(seed: int, page_size: int) -> None:
    check_random_steps(expand, seed, page_size)


def test_more_page_writes_than_there_is_room_for_all_arrive() -> None:
    rng = np.random.default_rng(0)
    limits = StepLimits(NUM_ROWS, 64, MAX_LEN, 4)
    tensors = StepTensors(limits, CPU, spare_page=1000)
    tensors.page_table[:NUM_ROWS] = 0
    table = PageTable(NUM_ROWS, MAX_LEN, 4)
    batch = random_step(rng, table, table.pages.size)
    assert batch.page_ids.size > limits.num_writes
    batch = replace(batch, query_lens=np.ones_like(batch.query_lens))
    batch = replace(batch, prefill_ids=batch.prefill_ids[: batch.rows.size - batch.num_decodes])
    StepBuffer(limits, tensors).send(batch)
    expand(tensors, limits, batch.rows.size)
    assert np.array_equal(tensors.page_table[:NUM_ROWS].numpy(), table.pages)


def test_more_biases_than_there_is_room_for_are_left_to_the_step() -> None:
    rng = np.random.default_rng(0)
    limits = StepLimits(NUM_ROWS, 300, MAX_LEN, 4)
    tensors = StepTensors(limits, CPU, spare_page=1000)
    batch = random_step(rng, PageTable(NUM_ROWS, MAX_LEN, 4), 0)
    pairs = [(0, i) for i in range(limits.num_biases + 1)]
    columns = sampling_columns(len(batch.sample_indices), suppress=pairs)
    step = StepBuffer(limits, tensors).send(replace(batch, sampling=columns))
    assert step.excess_biases is not None
    assert step.excess_biases.ids.tolist() == [i for _, i in pairs]
    assert int(tensors.words["num_biases"]) == 0


def test_biases_of_one_token_are_added_up_and_a_suppressed_token_stays_suppressed() -> None:
    columns = sampling_columns(4, suppress=[(1, 7), (3, 2**31 - 1), (1, 8)])
    given = random_penalties(np.random.default_rng(0), np.arange(4, dtype=np.int32))
    samples, ids, values = [2, 1, 2, 0, 3], [5, 7, 5, 7, 0], [1.5, 9.0, -4.0, 2.0, 3.0]
    penalties = replace(
        given,
        bias_samples=np.array(samples, np.int32),
        bias_ids=np.array(ids, np.int32),
        bias_values=np.array(values, np.float32),
    )
    biases = TokenBiases.of_step(columns, penalties)
    found = list(zip(biases.samples, biases.ids, biases.values, strict=True))
    low = -np.inf
    assert found == [
        (0, 7, 2.0),
        (1, 7, low),
        (1, 8, low),
        (2, 5, -2.5),
        (3, 0, 3.0),
        (3, 2**31 - 1, low),
    ]


def test_a_host_buffer_is_not_written_again_before_three_steps_are_over() -> None:
    limits = StepLimits(NUM_ROWS, 300, MAX_LEN, 4)
    buffer = StepBuffer(limits, StepTensors(limits, CPU, spare_page=1000))
    rng, used = np.random.default_rng(0), []
    for _ in range(9):
        step = buffer.send(random_step(rng, PageTable(NUM_ROWS, MAX_LEN, 4), 0))
        used.append(step.host.words.data_ptr())
        buffer.mark_launched()
    assert all(len(set(used[i : i + 3])) == 3 for i in range(7))


# The interpreter is chosen when a kernel is defined: another process, so that no test is moved.
_INTERPRETED = """
from minisrv.engine.kernels.triton_expand import expand
from tests.engine.test_step_buffer import check_random_steps
for seed, page_size in ((100, 1), (101, 16), (102, 64)):
    check_random_steps(expand, seed, page_size)
print("all alike")
"""
_COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minisrv.engine.kernels import triton_expand

long = {"last_token", "ids", "positions", "slots"}
for kernel, constants in (
    (triton_expand._write_pages, {"BLOCK": 256}),
    (triton_expand._expand, {"PAGE_SIZE": 16, "BLOCK": 256}),
):
    types = {name: "*i64" if name in long else "*i32" for name in kernel.arg_names}
    types |= {"width": "i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, types, constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert built.asm["cubin"]
print("compiled")
"""


@pytest.mark.parametrize(
    ("code", "interpret", "last_line"),
    [
        (_INTERPRETED, "1", "all alike"),
        pytest.param(_COMPILED, "0", "compiled", marks=pytest.mark.soak),
    ],
    ids=["interpreted", "compiled for sm_90"],
)
def test_the_kernel_does_the_same(code: str, interpret: str, last_line: str) -> None:
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "python")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == last_line
