"""One step of the engine from a batch to tokens, with the host in charge of every index.

This is what runs on a CPU, and on a GPU without FlashInfer.
"""

# Shapes: T tokens in the step, S sequences that sample.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from minisrv.engine.attention.base import AttentionBackend
from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.kernels.base import Kernels
from minisrv.engine.layers.decoder import Decoder
from minisrv.engine.page_table import PageTable, token_positions
from minisrv.engine.parallel.communicator import Communicator
from minisrv.engine.sampling.adjust import LogitAdjuster
from minisrv.engine.sampling.logprobs import Scores, StepScores, score_prompt
from minisrv.engine.sampling.sampler import sample
from minisrv.engine.upload import upload


@dataclass(frozen=True, slots=True)
class StepHandle:
    """A launched step: what came of it in host memory, there once `done` has happened."""

    token_ids_S: Tensor
    scores: Scores | None
    done: Any  # a CUDA event, or None


class Step(Protocol):
    """Computes steps, one after the other."""

    def compute(self, batch: ForwardBatch) -> StepHandle:
        """Launch a step; on a CPU it is done when this returns."""

    def logits(self, batch: ForwardBatch) -> Tensor:
        """The same without drawing: logits [S, V] of the sequences that sample."""


class HostStep:
    """See Step."""

    def __init__(
        self,
        model: Decoder,
        attention: AttentionBackend,
        kernels: Kernels,
        peers: Communicator,
        page_table: PageTable,
        device: torch.device,
    ) -> None:
        self._model, self._attention, self._kernels = model, attention, kernels
        self._peers, self._page_table, self._device = peers, page_table, device
        num_rows = page_table.pages.shape[0]
        self._adjuster = LogitAdjuster()
        self._last_token = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def compute(self, batch: ForwardBatch) -> StepHandle:
        """See Step."""
        with torch.inference_mode():
            return self._to_host(*self._forward(batch))

    def logits(self, batch: ForwardBatch) -> Tensor:
        """See Step."""
        with torch.inference_mode():
            return self._logits(batch, self._hidden(batch))

    def _hidden(self, batch: ForwardBatch) -> Tensor:
        """The model's last hidden states [T, C]."""
        self._page_table.apply(batch)
        positions = token_positions(batch)
        self._attention.plan(batch, self._page_table)
        return self._model.forward(self._input_ids(batch), self._to_device(positions))

    def _logits(self, batch: ForwardBatch, x_TC: Tensor) -> Tensor:
        last_tokens = (np.cumsum(batch.query_lens) - 1)[batch.sample_indices]
        return self._model.logits(x_TC, self._to_device(last_tokens))

    def _forward(self, batch: ForwardBatch) -> tuple[Tensor, Scores | None]:
        """The tokens [S], and the log-probabilities that were asked for."""
        x_TC = self._hidden(batch)
        logits_SV = self._logits(batch, x_TC)
        scores = self._open_scores(batch, logits_SV, x_TC)
        token_ids_S = torch.empty(0, dtype=torch.int64, device=self._device)
        if batch.sample_indices.size:
            token_ids_S = self._peers.from_rank_0_(self._sample(batch, logits_SV))
            rows = self._to_device(batch.rows[batch.sample_indices].astype(np.int64))
            self._last_token.index_copy_(0, rows, token_ids_S)
        return token_ids_S, None if scores is None else scores.finish(token_ids_S)

    def _open_scores(
        self, batch: ForwardBatch, logits_SV: Tensor, x_TC: Tensor
    ) -> StepScores | None:
        """What is told of the logits, which the draw overwrites."""
        columns = batch.logprobs
        scores = None if columns is None else StepScores(logits_SV, columns)
        if batch.scored_tokens.size:
            tokens_Q = self._to_device(batch.scored_tokens.astype(np.int64))
            score_prompt(scores, tokens_Q, lambda tokens: self._model.logits(x_TC, tokens))
        return scores

    def _sample(self, batch: ForwardBatch, logits_SV: Tensor) -> Tensor:
        """The tokens [S]; on a rank above 0, which has not all logits, room for them."""
        if self._peers.partition.rank > 0:
            return torch.empty(logits_SV.shape[0], dtype=torch.int64, device=self._device)
        ends = batch.start_positions + batch.query_lens
        new_positions = ends[batch.sample_indices].astype(np.int64)
        if batch.penalties is None:
            return sample(logits_SV, batch.sampling, new_positions, self._kernels)
        self._adjuster.adjust_(logits_SV, batch.penalties)
        token_ids_S = sample(logits_SV, batch.sampling, new_positions, self._kernels)
        self._adjuster.take(token_ids_S, batch.penalties)
        return token_ids_S

    def _input_ids(self, batch: ForwardBatch) -> Tensor:
        decode_rows = batch.rows[: batch.num_decodes].astype(np.int64)
        decode_ids = self._last_token.index_select(0, self._to_device(decode_rows))
        if not batch.prefill_ids.size:
            return decode_ids
        return torch.cat([decode_ids, self._to_device(batch.prefill_ids.astype(np.int64))])

    def _to_device(self, array: np.ndarray) -> Tensor:
        return upload(array, self._device)

    def _to_host(self, token_ids_S: Tensor, scores: Scores | None) -> StepHandle:
        if self._device.type == "cpu":
            return StepHandle(token_ids_S.int(), scores, None)
        host = to_pinned(token_ids_S.int())
        host_scores = None if scores is None else scores.map(to_pinned)
        done: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return StepHandle(host, host_scores, done)


def to_pinned(tensor: Tensor) -> Tensor:
    """A copy on its way to host memory, there when what is before it in the stream is done."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
