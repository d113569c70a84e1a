"""Runs a step with every index computed on the host: on a CPU, and on a GPU without FlashInfer."""

# Shapes: T tokens in the step, C hidden size, S sequences that sample, Q prompt tokens.

from __future__ import annotations

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
from minisrv.engine.sampling.logprobs import (
    LogprobTensors,
    StepLogprobs,
    add_prompt_in_slices,
)
from minisrv.engine.sampling.sampler import sample
from minisrv.engine.step_runner import StepHandle
from minisrv.engine.threads import ThreadGovernor
from minisrv.engine.transfer import download, upload


class HostRunner:
    """A StepRunner; only each row's last token stays on the device between steps."""

    def __init__(
        self,
        model: Decoder,
        attention: AttentionBackend,
        kernels: Kernels,
        communicator: Communicator,
        page_table: PageTable,
        adjuster: LogitAdjuster,
        device: torch.device,
        governor: ThreadGovernor | None = None,
    ) -> None:
        self._model, self._attention, self._kernels = model, attention, kernels
        self._communicator, self._page_table, self._device = communicator, page_table, device
        self._governor = governor
        self._adjuster, num_rows = adjuster, page_table.pages.shape[0]
        self._last_token = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def compute(self, batch: ForwardBatch) -> StepHandle:
        if self._governor is not None:
            self._governor.adapt()
        with torch.inference_mode():
            return self._to_host(*self._forward(batch))

    def logits(self, batch: ForwardBatch) -> Tensor:
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

    def _forward(self, batch: ForwardBatch) -> tuple[Tensor, LogprobTensors | None]:
        """The tokens [S], and the logprobs that were requested."""
        x_TC = self._hidden(batch)
        logits_SV = self._logits(batch, x_TC)
        logprobs = self._begin_logprobs(batch, logits_SV, x_TC)
        token_ids_S = torch.empty(0, dtype=torch.int64, device=self._device)
        if batch.sample_indices.size:
            token_ids_S = self._communicator.broadcast(self._sample(batch, logits_SV))
            rows = self._to_device(batch.rows[batch.sample_indices].astype(np.int64))
            self._last_token.index_copy_(0, rows, token_ids_S)
        return token_ids_S, None if logprobs is None else logprobs.finish(token_ids_S)

    def _begin_logprobs(
        self, batch: ForwardBatch, logits_SV: Tensor, x_TC: Tensor
    ) -> StepLogprobs | None:
        """Must run before sampling, which overwrites the logits."""
        columns = batch.logprobs
        logprobs = None if columns is None else StepLogprobs(logits_SV, columns)
        if batch.prompt_logprob_tokens.size:
            tokens_Q = self._to_device(batch.prompt_logprob_tokens.astype(np.int64))
            add_prompt_in_slices(
                logprobs, tokens_Q, lambda tokens: self._model.logits(x_TC, tokens)
            )
        return logprobs

    def _sample(self, batch: ForwardBatch, logits_SV: Tensor) -> Tensor:
        """The tokens [S]; on ranks above 0, which lack the full logits, an empty buffer."""
        if self._communicator.sharding.rank > 0:
            return torch.empty(logits_SV.shape[0], dtype=torch.int64, device=self._device)
        ends = batch.start_positions + batch.query_lens
        new_positions = ends[batch.sample_indices].astype(np.int64)
        if batch.penalties is None:
            return sample(logits_SV, batch.sampling, new_positions, self._kernels)
        self._adjuster.adjust_(logits_SV, batch.penalties)
        token_ids_S = sample(logits_SV, batch.sampling, new_positions, self._kernels)
        self._adjuster.count_tokens(token_ids_S, batch.penalties)
        return token_ids_S

    def _input_ids(self, batch: ForwardBatch) -> Tensor:
        decode_rows = batch.rows[: batch.num_decodes].astype(np.int64)
        decode_ids = self._last_token.index_select(0, self._to_device(decode_rows))
        if not batch.prefill_ids.size:
            return decode_ids
        return torch.cat([decode_ids, self._to_device(batch.prefill_ids.astype(np.int64))])

    def _to_device(self, array: np.ndarray) -> Tensor:
        return upload(array, self._device)

    def _to_host(self, token_ids_S: Tensor, logprobs: LogprobTensors | None) -> StepHandle:
        if self._device.type == "cpu":
            return StepHandle(token_ids_S.int(), logprobs, None)
        host = download(token_ids_S.int())
        host_logprobs = None if logprobs is None else logprobs.map(download)
        done: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return StepHandle(host, host_logprobs, done)
