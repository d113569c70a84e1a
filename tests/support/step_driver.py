"""Drives an engine by hand: sequences with pages of their own, in any order, a step at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minisrv.checkpoint.model_config import load_model_config
from minisrv.config import ServerConfig
from minisrv.engine.engine import Engine
from minisrv.engine.forward_batch import ForwardBatch, SamplingColumns


def open_engine(directory: Path, *, max_seq_len: int | None = None, **options: Any) -> Engine:
    config = ServerConfig(
        **{"model": str(directory), "num_threads": 1, "max_running_requests": 8, **options}
    )
    return Engine(config, directory, load_model_config(directory, max_seq_len))


def sampling_columns(size: int, **columns: Any) -> SamplingColumns:
    """Greedy unless a column says otherwise; a number is the same for every sequence."""
    defaults = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "seeds": 0, "choices": 0}
    types = {"top_k": np.int32, "seeds": np.int64, "choices": np.int32}
    suppressed = columns.pop("suppress", [])
    filled = {
        name: np.broadcast_to(np.array(value, types.get(name, np.float32)), (size,)).copy()
        for name, value in {**defaults, **columns}.items()
    }
    pairs = np.array(suppressed, np.int32).reshape(-1, 2)
    return SamplingColumns(**filled, suppress_samples=pairs[:, 0], suppress_ids=pairs[:, 1])


@dataclass(eq=False)
class Sequence_:
    row: int
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)


class StepDriver:
    """Hands out pages in a shuffled order, so that no two sequences lie side by side."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self.engine = engine
        self.free = list(range(engine.num_pages))
        random.Random(seed).shuffle(self.free)
        self.free_rows = list(range(8))

    def add(self) -> Sequence_:
        return Sequence_(self.free_rows.pop())

    def release(self, sequence: Sequence_) -> None:
        self.free += sequence.pages
        self.free_rows.append(sequence.row)

    def batch(
        self,
        decodes: Sequence[Sequence_] = (),
        prefills: Sequence[tuple[Sequence_, Sequence[int]]] = (),
        samples: Sequence[int] | None = None,
        **columns: Any,
    ) -> ForwardBatch:
        """One step; all sequences sample unless `samples` names their indices."""
        parts = [(s, 1) for s in decodes] + [(s, len(ids)) for s, ids in prefills]
        starts, writes = [s.num_computed for s, _ in parts], []
        for sequence, length in parts:
            sequence.num_computed += length
            while len(sequence.pages) * self.engine.page_size < sequence.num_computed:
                sequence.pages.append(self.free.pop())
                writes.append((sequence.row, len(sequence.pages) - 1, sequence.pages[-1]))
        chosen = range(len(parts)) if samples is None else samples
        placed = np.array(writes, np.int32).reshape(-1, 3)
        return ForwardBatch(
            step_id=0,
            num_decodes=len(decodes),
            rows=np.array([s.row for s, _ in parts], np.int32),
            query_lens=np.array([length for _, length in parts], np.int32),
            start_positions=np.array(starts, np.int32),
            prefill_ids=np.array([i for _, ids in prefills for i in ids], np.int32),
            page_rows=placed[:, 0],
            page_columns=placed[:, 1],
            page_ids=placed[:, 2],
            sample_indices=np.array(chosen, np.int32),
            sampling=sampling_columns(len(chosen), **columns),
        )

    def run(self, *args: Any, **kwargs: Any) -> list[int]:
        """The tokens of one step."""
        handle = self.engine.launch(self.batch(*args, **kwargs))
        return self.engine.wait(handle).token_ids.tolist()

    def logits(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.engine.compute_logits(self.batch(*args, **kwargs)).float()

    def generate(self, prompt: Sequence[int], count: int, **columns: Any) -> list[int]:
        """One sequence alone: its tokens, then its row and pages are free again."""
        sequence = self.add()
        tokens = self.run(prefills=[(sequence, prompt)], **columns)
        for _ in range(count - 1):
            tokens += self.run(decodes=[sequence], **columns)
        self.release(sequence)
        return tokens
