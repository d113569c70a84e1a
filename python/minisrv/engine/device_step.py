"""One step on a GPU that keeps its own state: the host sends words and reads tokens, no more.

A step of decodes alone replays two CUDA graphs, forward and sampler, recorded for a number of batch
sizes; between them there is room for work that only some steps need. It is padded to the next size
with sequences that have a row and a page of their own. A step with prompts runs eagerly. All work
is in one stream, so a step may be sent while the one before it runs: nothing that a step reads is
overwritten before it has been read, and its tokens wait on the device for the next step.
"""

# Shapes: T tokens in the step, S sequences that sample, V vocabulary.

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from minisrv.engine.attention.base import LayerAttention
from minisrv.engine.cuda_graph import Recorder, Replay
from minisrv.engine.forward_batch import ForwardBatch, SamplingColumns
from minisrv.engine.kernels.torch_native import mask_logits_
from minisrv.engine.layers.decoder import Decoder
from minisrv.engine.parallel.communicator import Communicator
from minisrv.engine.sampling.adjust import LogitAdjuster
from minisrv.engine.sampling.device_columns import DeviceColumns
from minisrv.engine.sampling.logprobs import StepScores, score_prompt
from minisrv.engine.step_buffer import SentStep, StepBuffer, StepLimits, StepTensors
from minisrv.engine.step_runner import StepHandle, to_pinned
from minisrv.engine.upload import upload

logger = logging.getLogger("minisrv.engine")

_RESULTS_IN_FLIGHT = 4


class DeviceAttention(LayerAttention, Protocol):
    """Attention that is planned from a step's words."""

    def read_from(self, tensors: StepTensors) -> None:
        """Where the steps' words, slots and page lists lie."""

    def plan(self, step: SentStep) -> None:
        """Prepare what the layers of a step share."""

    def plan_for_graph(self, step: SentStep) -> None:
        """The same for a step of decodes whose forward a CUDA graph holds, or will hold."""


@dataclass(frozen=True, slots=True)
class DeviceKernels:
    """What a step does between its layers: see triton_expand.expand and sample_on_device."""

    expand: Callable[[StepTensors, StepLimits, int], None]
    sample: Callable[[Tensor, DeviceColumns, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Graphs:
    forward: Replay
    sampler: Replay
    logits: list[Tensor]  # the one that `forward` writes


class DeviceStep:
    """See Step. `spare_page` is a page of the cache that no sequence gets."""

    def __init__(
        self,
        model: Decoder,
        attention: DeviceAttention,
        kernels: DeviceKernels,
        peers: Communicator,
        limits: StepLimits,
        device: torch.device,
    ) -> None:
        self._model, self._attention, self._kernels = model, attention, kernels
        self._peers, self._limits, self._device = peers, limits, device
        self._tensors = StepTensors(limits, device, spare_page=0)
        self._buffer = StepBuffer(limits, self._tensors)
        attention.read_from(self._tensors)
        self._graphs: dict[int, _Graphs] = {}
        self._sizes = np.empty(0, np.int64)
        self._has_warned = False
        pinned = device.type == "cuda"
        self._results = [
            torch.empty(limits.num_rows, dtype=torch.int32, pin_memory=pinned)
            for _ in range(_RESULTS_IN_FLIGHT)
        ]
        self._turn = 0
        self._adjuster = LogitAdjuster()

    def pad_with(self, spare_page: int) -> None:
        """Which page of the cache belongs to padding."""
        self._tensors.page_table[self._limits.num_rows] = spare_page

    def record(
        self, sizes: list[int], recorder: Recorder, progress: Callable[[float], None]
    ) -> None:
        """Record the graphs of decode steps of these sizes, ascending; the largest comes first,
        for the others then find memory of its size.
        """
        with torch.inference_mode():
            for count, size in enumerate(reversed(sizes)):
                progress(count / len(sizes))
                self._graphs[size] = self._record(size, recorder)
        self._sizes = np.array(sizes)

    def compute(self, batch: ForwardBatch) -> StepHandle:
        """See Step."""
        with torch.inference_mode():
            size = self._graph_size(batch)
            logits_SV, step, scores = self._replay(batch, size) if size else self._run(batch)
            # The other ranks have a share of the vocabulary, and none of this is for them.
            penalties = batch.penalties if self._peers.partition.rank == 0 else None
            if self._peers.partition.rank == 0:
                self._mask(batch.sampling, logits_SV, step)
            if penalties is not None:
                self._adjuster.adjust_(logits_SV, penalties)
            if size:
                self._graphs[size].sampler()
            elif step.num_samples:
                self._sample(logits_SV, step.num_samples)
            if penalties is not None:
                self._adjuster.take(self._tensors.tokens_S, penalties)
            handle = self._to_host(step.num_samples, scores)
        self._buffer.done()
        return handle

    def logits(self, batch: ForwardBatch) -> Tensor:
        """See Step."""
        with torch.inference_mode():
            logits_SV, _, _ = self._run(batch)
        self._buffer.done()
        return logits_SV

    def _graph_size(self, batch: ForwardBatch) -> int:
        """The recorded size to pad the batch to, or 0 to run it eagerly."""
        size = batch.num_decodes
        if not self._graphs or size < batch.rows.size:
            return 0
        found = int(np.searchsorted(self._sizes, size))
        if found < len(self._sizes):
            return int(self._sizes[found])
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "a step of %d sequences is over --cuda-graph-max-bs: such steps run without a "
                "CUDA graph, slower",
                size,
            )
        return 0

    def _replay(self, batch: ForwardBatch, size: int) -> tuple[Tensor, SentStep, StepScores | None]:
        step = self._buffer.send(batch, padded_to=size)
        self._attention.plan_for_graph(step)
        self._graphs[size].forward()
        logits_SV = self._graphs[size].logits[0]
        return logits_SV, step, _open_scores(batch, logits_SV)

    def _run(self, batch: ForwardBatch) -> tuple[Tensor, SentStep, StepScores | None]:
        step = self._buffer.send(batch)
        self._attention.plan(step)
        num_sequences = step.num_decodes + step.num_prefills
        x_TC = self._hidden(num_sequences, step.num_tokens)
        logits_SV = self._logits(x_TC, step.num_samples)
        scores = _open_scores(batch, logits_SV)
        if batch.scored_tokens.size:
            tokens_Q = self._copied(batch.scored_tokens)
            score_prompt(scores, tokens_Q, lambda tokens: self._model.logits(x_TC, tokens))
        return logits_SV, step, scores

    def _hidden(self, num_sequences: int, num_tokens: int) -> Tensor:
        """The model's last hidden states [T, C] of what the words say."""
        tensors = self._tensors
        self._kernels.expand(tensors, self._limits, num_sequences)
        return self._model.forward(tensors.ids_T[:num_tokens], tensors.positions_T[:num_tokens])

    def _logits(self, x_TC: Tensor, num_samples: int) -> Tensor:
        return self._model.logits(x_TC, self._tensors.words["sample_tokens"][:num_samples])

    def _mask(self, columns: SamplingColumns, logits_SV: Tensor, step: SentStep) -> None:
        """Forbid here what grammars do not allow, and what was too much for the words."""
        if columns.grammar is not None:
            samples_G = self._copied(columns.grammar.samples)
            mask_logits_(logits_SV, samples_G, self._copied(columns.grammar.fill()))
        if step.suppressed_beyond:
            samples, ids = (
                self._copied(array) for array in (columns.suppress_samples, columns.suppress_ids)
            )
            logits_SV[samples.long(), ids.long()] = -torch.inf

    def _sample(self, logits_SV: Tensor, size: int) -> None:
        """Draw the tokens of the first `size` samples, and keep them for the next step."""
        tensors = self._tensors
        tokens_S = tensors.tokens_S[:size]
        if self._peers.partition.rank == 0:
            self._kernels.sample(logits_SV, tensors.columns(size), tokens_S)
        self._peers.from_rank_0_(tokens_S)
        rows_S = tensors.words["sample_rows"][:size].long()
        tensors.last_token.index_copy_(0, rows_S, tokens_S.long())

    def _record(self, size: int, recorder: Recorder) -> _Graphs:
        """Both graphs of a size, recorded on a step that is nothing but padding."""
        step = self._buffer.send(_NO_SEQUENCES, padded_to=size)
        self._attention.plan_for_graph(step)
        logits: list[Tensor] = []

        def forward() -> None:
            logits[:] = [self._logits(self._hidden(size, size), size)]

        replay = recorder.record(forward)
        replay()
        sampler = recorder.record(lambda: self._sample(logits[0], size))
        self._buffer.done()
        return _Graphs(replay, sampler, logits)

    def _to_host(self, size: int, scores: StepScores | None) -> StepHandle:
        host = self._results[self._turn][:size]
        self._turn = (self._turn + 1) % _RESULTS_IN_FLIGHT
        tokens_S = self._tensors.tokens_S[:size]
        host.copy_(tokens_S, non_blocking=True)
        host_scores = None if scores is None else scores.finish(tokens_S).map(to_pinned)
        if self._device.type == "cpu":
            return StepHandle(host, host_scores, None)
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return StepHandle(host, host_scores, done)

    def _copied(self, array: np.ndarray) -> Tensor:
        return upload(array, self._device)


def _open_scores(batch: ForwardBatch, logits_SV: Tensor) -> StepScores | None:
    return None if batch.logprobs is None else StepScores(logits_SV, batch.logprobs)


_NONE = np.empty(0, np.int32)
_NO_FLOATS = np.empty(0, np.float32)
_NO_SEQUENCES = ForwardBatch(
    step_id=0,
    num_decodes=0,
    rows=_NONE,
    query_lens=_NONE,
    start_positions=_NONE,
    prefill_ids=_NONE,
    page_rows=_NONE,
    page_columns=_NONE,
    page_ids=_NONE,
    sample_indices=_NONE,
    sampling=SamplingColumns(
        temperature=_NO_FLOATS,
        top_p=_NO_FLOATS,
        top_k=_NONE,
        min_p=_NO_FLOATS,
        seeds=np.empty(0, np.int64),
        choices=_NONE,
        suppress_samples=_NONE,
        suppress_ids=_NONE,
    ),
)
