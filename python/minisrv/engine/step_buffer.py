"""A step as one buffer of 32-bit words: filled on the host, copied to the device in one go.

Positions, lengths and pages are known to the host before the tokens of the step before are, so a
step can be sent while the one before it still runs. What the device makes of it itself (input ids,
positions, cache slots, lists of pages) is in `StepTensors`, computed by `kernels/triton_expand.py`.
"""

# Sizes: R sequences, T tokens, S samples, W page writes, P suppressed pairs.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.sampling.device_columns import DeviceColumns
from minisrv.engine.upload import upload

_STEPS_IN_FLIGHT = 3


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The most that a step may hold."""

    num_rows: int  # sequences, padding included
    num_prefill_tokens: int
    max_seq_len: int
    page_size: int

    @property
    def num_tokens(self) -> int:
        """Decodes and prompt tokens of a step."""
        return self.num_rows + self.num_prefill_tokens

    @property
    def max_pages(self) -> int:
        """Pages of one sequence."""
        return -(-self.max_seq_len // self.page_size)

    @property
    def num_writes(self) -> int:
        """Page writes that the buffer takes; a step that brings more is sent in parts."""
        return 2 * self.num_rows + -(-self.num_prefill_tokens // self.page_size)

    @property
    def num_suppressed(self) -> int:
        """Suppressed pairs that the buffer takes."""
        return 4 * self.num_rows

    def sections(self) -> dict[str, int]:
        """Words of each part of the buffer; what only prompts need comes last."""
        rows, starts = self.num_rows, self.num_rows + 1
        sampling = ("temperature", "top_k", "top_p", "min_p", "choices", "new_positions")
        return {
            "seeds": 2 * rows,  # 64 bits each, so they come first, where they are aligned
            "num_decodes": 1,
            "num_writes": 1,
            "num_suppressed": 1,
            "rows": rows,
            "start_positions": rows,
            "query_starts": starts,
            "page_starts": starts,
            "last_page_lens": rows,
            "sample_tokens": rows,
            "sample_rows": rows,
            **dict.fromkeys(sampling, rows),
            "suppress_samples": self.num_suppressed,
            "suppress_ids": self.num_suppressed,
            "write_rows": self.num_writes,
            "write_columns": self.num_writes,
            "write_pages": self.num_writes,
            "prefill_query_starts": starts,
            "prefill_page_starts": starts,
            "prefill_ids": self.num_prefill_tokens,
        }


_FLOATS = ("temperature", "top_p", "min_p")


class StepWords:
    """The parts of one buffer as tensors of their own types, by name."""

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
        self.decode_size = size - limits.num_prefill_tokens - 2 * (limits.num_rows + 1)

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name]


class StepTensors:
    """What lives on the device: the tables, the step's words, and what is computed from them.

    Row `limits.num_rows` of the tables and page `spare_page` of the cache belong to padding.
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

    def columns(self, size: int) -> DeviceColumns:
        """The sampling parameters of the first `size` samples."""
        words = self.words
        return DeviceColumns(
            temperature_S=words["temperature"][:size],
            top_k_S=words["top_k"][:size],
            top_p_S=words["top_p"][:size],
            min_p_S=words["min_p"][:size],
            seeds_S=words["seeds"][:size],
            choices_S=words["choices"][:size],
            positions_S=words["new_positions"][:size],
            suppress_samples_P=words["suppress_samples"],
            suppress_ids_P=words["suppress_ids"],
            num_suppressed=words["num_suppressed"],
        )


@dataclass(frozen=True, slots=True)
class SentStep:
    """A step on its way, as attention plans it: counts, and the host's side of the words.

    Of a padded step `num_decodes` counts the padding; `kv_lens` are of all sequences.
    """

    host: StepWords
    num_decodes: int
    num_prefills: int
    num_tokens: int
    num_samples: int
    num_decode_pages: int
    num_pages: int
    kv_lens: Tensor  # int32 on the host
    suppressed_beyond: bool  # not all suppressed pairs fit into the words


class StepBuffer:
    """Sends steps: host buffers in turn, each reused when the step that was in it is over."""

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
        self._over: list[Any] = [None] * _STEPS_IN_FLIGHT
        self._turn = 0

    def send(self, batch: ForwardBatch, padded_to: int = 0) -> SentStep:
        """Copy a step to the device; `padded_to` sequences, if it is more than there are.

        Only a step without prompts can be padded. Call `done` when all that reads it is launched.
        """
        over, words, to = self._over[self._turn], self._ring[self._turn], self._arrays[self._turn]
        if over is not None:
            over.synchronize()
        self._send_writes_beyond(batch)
        sent = _fill(to, words, batch, max(padded_to, batch.rows.size), self._limits)
        size = words.words.numel() if sent.num_prefills else words.decode_size
        self._tensors.words.words[:size].copy_(words.words[:size], non_blocking=True)
        return sent

    def done(self) -> None:
        """Everything that reads the last step sent is launched."""
        if self._on_device:
            self._over[self._turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._over[self._turn].record()
        self._turn = (self._turn + 1) % _STEPS_IN_FLIGHT

    def _send_writes_beyond(self, batch: ForwardBatch) -> None:
        """A step that takes over long cached prefixes may bring more writes than there is room."""
        room = self._limits.num_writes
        if batch.page_ids.size > room:
            rows, columns, pages = (
                upload(array[room:], self._tensors.page_table.device)
                for array in (batch.page_rows, batch.page_columns, batch.page_ids)
            )
            self._tensors.page_table.index_put_((rows.long(), columns.long()), pages)


def _fill(
    to: dict[str, Any], words: StepWords, batch: ForwardBatch, size: int, limits: StepLimits
) -> SentStep:
    """Write a batch into the host's words, padded to `size` sequences."""
    used, samples = batch.rows.size, batch.sample_indices.size
    padding = size - used
    num_decodes = batch.num_decodes + padding
    num_tokens = int(batch.query_lens.sum()) + padding
    assert not padding or used == batch.num_decodes
    assert num_tokens <= limits.num_tokens
    _put(to["rows"], batch.rows, padding, limits.num_rows)
    _put(to["start_positions"], batch.start_positions, padding, 0)
    kv_lens = np.ones(size, np.int32)
    np.add(batch.start_positions, batch.query_lens, out=kv_lens[:used])
    counts = (kv_lens + (limits.page_size - 1)) // limits.page_size
    _put_starts(to["query_starts"], batch.query_lens, padding)
    _put_starts(to["page_starts"], counts, 0)
    to["last_page_lens"][:size] = (kv_lens - 1) % limits.page_size + 1
    to["num_decodes"][0] = num_decodes
    num_prefills = size - num_decodes
    if num_prefills:
        to["prefill_ids"][: batch.prefill_ids.size] = batch.prefill_ids
        _put_starts(to["prefill_query_starts"], batch.query_lens[num_decodes:], 0)
        _put_starts(to["prefill_page_starts"], counts[num_decodes:], 0)
    _fill_writes(to, batch, limits.num_writes)
    last_tokens = to["query_starts"][1 : used + 1][batch.sample_indices] - 1
    sample_padding = size - samples if padding else 0
    _put(to["sample_tokens"], last_tokens, sample_padding, 0)
    _put(to["sample_rows"], batch.rows[batch.sample_indices], sample_padding, limits.num_rows)
    _put(to["new_positions"], kv_lens[batch.sample_indices], sample_padding, 0)
    return SentStep(
        host=words,
        num_decodes=num_decodes,
        num_prefills=num_prefills,
        num_tokens=num_tokens,
        num_samples=samples,
        num_decode_pages=int(to["page_starts"][num_decodes]),
        num_pages=int(to["page_starts"][size]),
        kv_lens=torch.from_numpy(kv_lens),
        suppressed_beyond=_fill_sampling(to, batch, sample_padding),
    )


def _fill_writes(to: dict[str, Any], batch: ForwardBatch, room: int) -> None:
    count = min(batch.page_ids.size, room)
    to["num_writes"][0] = count
    to["write_rows"][:count] = batch.page_rows[:count]
    to["write_columns"][:count] = batch.page_columns[:count]
    to["write_pages"][:count] = batch.page_ids[:count]


def _fill_sampling(to: dict[str, Any], batch: ForwardBatch, padding: int) -> bool:
    """Write the parameters; whether there are more suppressed pairs than room for them."""
    columns = batch.sampling
    _put(to["seeds"], columns.seeds, padding, 0)
    _put(to["choices"], columns.choices, padding, 0)
    _put(to["temperature"], columns.temperature, padding, 0.0)
    _put(to["top_k"], columns.top_k, padding, 0)
    _put(to["top_p"], columns.top_p, padding, 1.0)
    _put(to["min_p"], columns.min_p, padding, 0.0)
    count = columns.suppress_ids.size
    beyond = count > to["suppress_ids"].size
    to["num_suppressed"][0] = 0 if beyond else count
    if not beyond:
        to["suppress_samples"][:count] = columns.suppress_samples
        to["suppress_ids"][:count] = columns.suppress_ids
    return bool(beyond)


def _put(to: Any, values: Any, padding: int, filler: float) -> None:
    used = len(values)
    to[:used] = values
    to[used : used + padding] = filler


def _put_starts(to: Any, lengths: Any, padding: int) -> None:
    """Where sequences of these lengths begin, and where the last ends; padding is 1 long."""
    used = len(lengths)
    to[0] = 0
    np.cumsum(lengths, out=to[1 : used + 1])
    to[used + 1 : used + padding + 1] = to[used] + np.arange(1, padding + 1)
