"""A step as one buffer of 32-bit words, filled on the host and copied to the device at once.

The host knows positions, lengths and pages before it knows the tokens of the previous step, so a
step can be sent while the previous one still runs. What the device derives from the words (input
ids, positions, cache slots, page lists) is in `StepTensors`, filled by `kernels/triton_expand.py`.
"""

# Sizes: R sequences, T tokens, S samples, W page writes, P pairs of sample and token with a bias.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.graph_shapes import GraphShape, pad_to_shape
from minisrv.engine.kernels.base import PenaltyColumns
from minisrv.engine.sampling.device_columns import (
    BiasColumns,
    CountedPenalties,
    DeviceColumns,
    TokenBiases,
)
from minisrv.engine.transfer import upload

_STEPS_IN_FLIGHT = 3


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Upper bounds on what one step contains."""

    num_rows: int  # sequences, padding included
    num_prefill_tokens: int
    max_seq_len: int
    page_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens of one step, decode and prefill."""
        return self.num_rows + self.num_prefill_tokens

    @property
    def max_pages(self) -> int:
        """Pages of one sequence."""
        return -(-self.max_seq_len // self.page_size)

    @property
    def num_writes(self) -> int:
        """Page writes that fit into the buffer; `StepBuffer.send` copies any others separately."""
        return 2 * self.num_rows + -(-self.num_prefill_tokens // self.page_size)

    @property
    def num_biases(self) -> int:
        """(sample, token) pairs with a bias that fit into the buffer."""
        return 4 * self.num_rows

    def sections(self) -> dict[str, int]:
        """Size in words of each section; those that only prefill needs come last."""
        rows, starts = self.num_rows, self.num_rows + 1
        sampling = ("temperature", "top_k", "top_p", "min_p", "choices", "new_positions")
        return {
            "seeds": 2 * rows,  # 64 bits each; first, so that they are aligned
            "num_decodes": 1,
            "num_writes": 1,
            "num_biases": 1,
            "rows": rows,
            "start_positions": rows,
            "query_starts": starts,
            "page_starts": starts,
            "last_page_lens": rows,
            "sample_tokens": rows,
            "sample_rows": rows,
            **dict.fromkeys(sampling, rows),
            "penalties": 3 * rows,  # repetition of each, then frequency, then presence
            "bias_samples": self.num_biases,
            "bias_ids": self.num_biases,
            "bias_values": self.num_biases,
            "write_rows": self.num_writes,
            "write_columns": self.num_writes,
            "write_pages": self.num_writes,
            "prefill_query_starts": starts,
            "prefill_ids": self.num_prefill_tokens,
        }


_FLOATS = ("temperature", "top_p", "min_p", "penalties", "bias_values")


class StepWords:
    """One buffer, and its sections by name as tensors of their own types."""

    def __init__(self, limits: StepLimits, device: torch.device, *, pinned: bool) -> None:
        sections = limits.sections()
        size = sum(sections.values())
        self.words = torch.zeros(size, dtype=torch.int32, device=device, pin_memory=pinned)
        self.parts: dict[str, Tensor] = {}
        offset = 0
        for name, length in sections.items():
            part = self.words[offset : offset + length]
            if name == "seeds":
                part = part.view(torch.int64)
            elif name in _FLOATS:
                part = part.view(torch.float32)
            self.parts[name] = part
            offset += length
        self.decode_size = size - limits.num_prefill_tokens - (limits.num_rows + 1)

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name]


class StepTensors:
    """The state on the device: page table, last tokens, the step's words, and what they expand to.

    Row `limits.num_rows` of the tables and page `spare_page` of the cache are for padding.
    """

    def __init__(self, limits: StepLimits, device: torch.device, spare_page: int) -> None:
        rows = limits.num_rows + 1
        shape = (rows, limits.max_pages)
        self.page_table = torch.full(shape, spare_page, dtype=torch.int32, device=device)
        self.last_token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.words = StepWords(limits, device, pinned=False)
        self.ids_T = torch.zeros(limits.num_tokens, dtype=torch.int64, device=device)
        self.positions_T = torch.zeros_like(self.ids_T)
        self.slots_T = torch.zeros_like(self.ids_T)
        num_pages = limits.num_rows * limits.max_pages
        self.pages = torch.zeros(num_pages, dtype=torch.int32, device=device)
        self.tokens_S = torch.zeros(limits.num_rows, dtype=torch.int32, device=device)
        self._every_sample = torch.arange(limits.num_rows, device=device)

    def columns(self, size: int, counts_RV: Tensor) -> DeviceColumns:
        """The sampling parameters of the first `size` samples; `counts_RV` is for penalties."""
        words = self.words
        penalties = PenaltyColumns(
            self._every_sample[:size],
            words["sample_rows"][:size],
            words["penalties"].view(3, -1)[:, :size],
        )
        return DeviceColumns(
            temperature_S=words["temperature"][:size],
            top_k_S=words["top_k"][:size],
            top_p_S=words["top_p"][:size],
            min_p_S=words["min_p"][:size],
            seeds_S=words["seeds"][:size],
            choices_S=words["choices"][:size],
            positions_S=words["new_positions"][:size],
            biases=BiasColumns(
                words["bias_samples"], words["bias_ids"], words["bias_values"], words["num_biases"]
            ),
            penalties=CountedPenalties(counts_RV, penalties),
        )


@dataclass(frozen=True, slots=True)
class SentStep:
    """What attention needs to plan a sent step: its counts, and the words on the host.

    In a padded step `num_decodes` and `kv_lens` include the padding.
    """

    host: StepWords
    num_decodes: int
    num_prefills: int
    num_tokens: int
    num_samples: int
    num_decode_pages: int
    num_pages: int
    kv_lens: Tensor  # int32 on the host
    excess_biases: TokenBiases | None  # all of them, if too many for the words: none are in these


class StepBuffer:
    """Sends steps through a ring of host buffers; each is reused once its step has finished."""

    def __init__(self, limits: StepLimits, tensors: StepTensors) -> None:
        self._limits, self._tensors = limits, tensors
        device = tensors.words.words.device
        self._on_device = device.type == "cuda"
        cpu = torch.device("cpu")
        self._ring = [
            StepWords(limits, cpu, pinned=self._on_device) for _ in range(_STEPS_IN_FLIGHT)
        ]
        self._arrays = [
            {name: part.numpy() for name, part in words.parts.items()} for words in self._ring
        ]
        self._finished: list[Any] = [None] * _STEPS_IN_FLIGHT
        self._next = 0

    def send(self, batch: ForwardBatch, shape: GraphShape | None = None) -> SentStep:
        """Copy a step to the device, padded to `shape` if one is given.

        Call `mark_launched` after launching all work that reads the step.
        """
        finished = self._finished[self._next]
        words, arrays = self._ring[self._next], self._arrays[self._next]
        if finished is not None:
            finished.synchronize()
        self._send_excess_writes(batch)
        sent = _fill(arrays, words, batch, shape, self._limits)
        size = words.words.numel() if sent.num_prefills else words.decode_size
        self._tensors.words.words[:size].copy_(words.words[:size], non_blocking=True)
        return sent

    def mark_launched(self) -> None:
        """All work that reads the last sent step has been launched."""
        if self._on_device:
            self._finished[self._next] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._finished[self._next].record()
        self._next = (self._next + 1) % _STEPS_IN_FLIGHT

    def _send_excess_writes(self, batch: ForwardBatch) -> None:
        """A step that reuses long cached prefixes may have more writes than fit into the words."""
        room = self._limits.num_writes
        if batch.page_ids.size > room:
            rows, columns, pages = (
                upload(array[room:], self._tensors.page_table.device)
                for array in (batch.page_rows, batch.page_columns, batch.page_ids)
            )
            self._tensors.page_table.index_put_((rows.long(), columns.long()), pages)


def _fill(
    out: dict[str, Any],
    words: StepWords,
    batch: ForwardBatch,
    shape: GraphShape | None,
    limits: StepLimits,
) -> SentStep:
    """Write a batch into the words on the host, padded to `shape`; so are its samples."""
    if shape is not None and shape.num_chunks:
        batch = pad_to_shape(batch, shape, limits.num_rows)
    used, samples = batch.rows.size, batch.sample_indices.size
    size = used if shape is None else shape.num_sequences
    padding = size - used
    num_decodes = batch.num_decodes + padding
    num_tokens = int(batch.query_lens.sum()) + padding
    assert not padding or used == batch.num_decodes
    assert num_tokens <= limits.num_tokens
    _write_padded(out["rows"], batch.rows, padding, limits.num_rows)
    _write_padded(out["start_positions"], batch.start_positions, padding, 0)
    kv_lens = np.ones(size, np.int32)
    np.add(batch.start_positions, batch.query_lens, out=kv_lens[:used])
    counts = (kv_lens + (limits.page_size - 1)) // limits.page_size
    _write_starts(out["query_starts"], batch.query_lens, padding)
    _write_starts(out["page_starts"], counts, 0)
    # An empty sequence has no page, and 0 tokens in the last one.
    out["last_page_lens"][:size] = kv_lens - np.maximum(counts - 1, 0) * limits.page_size
    out["num_decodes"][0] = num_decodes
    num_prefills = size - num_decodes
    if num_prefills:
        out["prefill_ids"][: batch.prefill_ids.size] = batch.prefill_ids
        _write_starts(out["prefill_query_starts"], batch.query_lens[num_decodes:], 0)
    _fill_writes(out, batch, limits.num_writes)
    last_tokens = out["query_starts"][1 : used + 1][batch.sample_indices] - 1
    sample_padding = 0 if shape is None else size - samples
    _write_padded(out["sample_tokens"], last_tokens, sample_padding, 0)
    _write_padded(
        out["sample_rows"], batch.rows[batch.sample_indices], sample_padding, limits.num_rows
    )
    _write_padded(out["new_positions"], kv_lens[batch.sample_indices], sample_padding, 0)
    return SentStep(
        host=words,
        num_decodes=num_decodes,
        num_prefills=num_prefills,
        num_tokens=num_tokens,
        num_samples=samples,
        num_decode_pages=int(out["page_starts"][num_decodes]),
        num_pages=int(out["page_starts"][size]),
        kv_lens=torch.from_numpy(kv_lens),
        excess_biases=_fill_sampling(out, batch, sample_padding),
    )


def _fill_writes(out: dict[str, Any], batch: ForwardBatch, room: int) -> None:
    count = min(batch.page_ids.size, room)
    out["num_writes"][0] = count
    out["write_rows"][:count] = batch.page_rows[:count]
    out["write_columns"][:count] = batch.page_columns[:count]
    out["write_pages"][:count] = batch.page_ids[:count]


def _fill_sampling(out: dict[str, Any], batch: ForwardBatch, padding: int) -> TokenBiases | None:
    """Write the sampling parameters; returns the biases if they did not fit."""
    columns = batch.sampling
    _write_padded(out["seeds"], columns.seeds, padding, 0)
    _write_padded(out["choices"], columns.choices, padding, 0)
    _write_padded(out["temperature"], columns.temperature, padding, 0.0)
    _write_padded(out["top_k"], columns.top_k, padding, 0)
    _write_padded(out["top_p"], columns.top_p, padding, 1.0)
    _write_padded(out["min_p"], columns.min_p, padding, 0.0)
    _fill_penalties(out["penalties"].reshape(3, -1), batch, padding)
    biases = TokenBiases.of_step(columns, batch.penalties)
    count = biases.ids.size
    beyond = count > out["bias_ids"].size
    out["num_biases"][0] = 0 if beyond else count
    if beyond:
        return biases
    out["bias_samples"][:count] = biases.samples
    out["bias_ids"][:count] = biases.ids
    out["bias_values"][:count] = biases.values
    return None


def _fill_penalties(out_3R: Any, batch: ForwardBatch, padding: int) -> None:
    neutral = out_3R[:, : batch.sample_indices.size + padding]
    neutral[0], neutral[1:] = 1.0, 0.0
    given = batch.penalties
    if given is not None:
        out_3R[:, given.samples] = given.repetition, given.frequency, given.presence


def _write_padded(out: Any, values: Any, padding: int, filler: float) -> None:
    used = len(values)
    out[:used] = values
    out[used : used + padding] = filler


def _write_starts(out: Any, lengths: Any, padding: int) -> None:
    """Write where sequences of these lengths start and the last ends; padding has length 1."""
    used = len(lengths)
    out[0] = 0
    np.cumsum(lengths, out=out[1 : used + 1])
    out[used + 1 : used + padding + 1] = out[used] + np.arange(1, padding + 1)
