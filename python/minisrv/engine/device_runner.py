"""Runs a step with its state on the GPU: the host only sends the step's words and reads its tokens.

A decode-only step replays two CUDA graphs, forward and sampler, which are recorded for a fixed list
of batch sizes; work that only some steps need runs between the two. The batch is padded to the next
recorded size with dummy sequences that use a reserved row and page. A step with prefill chunks runs
eagerly, or, with --cuda-graph-max-tokens, is padded and replayed in the same way. All work is in
one stream, so a step can be sent while the previous one runs: nothing that a step reads is
overwritten before it has been read, and its tokens stay on the device for the next.
"""

# Shapes: T tokens in the step, S sequences that sample, V vocabulary.

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from minisrv.engine.attention.base import LayerAttention
from minisrv.engine.cuda_graph import Recorder, Replay
from minisrv.engine.forward_batch import ForwardBatch, SamplingColumns
from minisrv.engine.graph_shapes import GraphShape
from minisrv.engine.layers.decoder import Decoder
from minisrv.engine.parallel.communicator import Communicator
from minisrv.engine.sampling.adjust import LogitAdjuster
from minisrv.engine.sampling.device_columns import BiasColumns, DeviceColumns, TokenBiases
from minisrv.engine.sampling.logprobs import StepLogprobs, add_prompt_in_slices
from minisrv.engine.step_buffer import SentStep, StepBuffer, StepLimits, StepTensors
from minisrv.engine.step_runner import StepHandle
from minisrv.engine.transfer import download, upload

logger = logging.getLogger("minisrv.engine")

_RESULTS_IN_FLIGHT = 4


class DeviceAttention(LayerAttention, Protocol):
    """Attention that is planned from the words of a sent step."""

    def read_from(self, tensors: StepTensors) -> None:
        """Set the tensors that hold the words, slots and page lists of every step."""

    def plan(self, step: SentStep) -> None:
        """Prepare what all layers of a step share."""

    def plan_for_graph(self, step: SentStep) -> None:
        """As `plan`, for a padded step whose forward is in a CUDA graph or being recorded."""

    def begin(self) -> None:
        """Compute on the device what all layers share. The words have been expanded there."""


@dataclass(frozen=True, slots=True)
class DeviceKernels:
    """What a step runs outside the layers; see `expand`, `sample_on_device`, `mask_logits`."""

    expand: Callable[[StepTensors, StepLimits, int], None]
    sample: Callable[[Tensor, DeviceColumns, Tensor], Tensor]
    mask: Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class _Graphs:
    forward: Replay
    sampler: Replay


class DeviceRunner:
    """A StepRunner whose page table, last tokens and sampling columns are on the GPU."""

    def __init__(
        self,
        model: Decoder,
        attention: DeviceAttention,
        kernels: DeviceKernels,
        communicator: Communicator,
        limits: StepLimits,
        adjuster: LogitAdjuster,
        device: torch.device,
    ) -> None:
        self._model, self._attention, self._kernels = model, attention, kernels
        self._communicator, self._limits, self._device = communicator, limits, device
        self._adjuster = adjuster
        self._tensors = StepTensors(limits, device, spare_page=0)
        self._buffer = StepBuffer(limits, self._tensors)
        attention.read_from(self._tensors)
        self._graphs: dict[GraphShape, _Graphs] = {}
        self._decode_sizes = np.empty(0, np.int64)
        self._mixed_shapes: list[GraphShape] = []
        self._samplers: dict[int, Replay] = {}
        self._graph_logits_SV = torch.empty(0)
        self._has_warned = False
        pinned = device.type == "cuda"
        self._results = [
            torch.empty(limits.num_rows, dtype=torch.int32, pin_memory=pinned)
            for _ in range(_RESULTS_IN_FLIGHT)
        ]
        self._next = 0

    def pad_with(self, spare_page: int) -> None:
        """Set the page that padding sequences read and write; no real sequence may own it."""
        self._tensors.page_table[self._limits.num_rows] = spare_page

    def record(
        self, shapes: list[GraphShape], recorder: Recorder, progress: Callable[[float], object]
    ) -> None:
        """Record graphs for steps of `shapes`: the first that a step fits is the one to use.

        The largest is recorded first, so that the others reuse its memory. They also share the
        tensor to which they write the logits, which would otherwise stay allocated once per shape.
        """
        largest_first = sorted(shapes, key=lambda shape: shape.num_tokens, reverse=True)
        has_logits = self._communicator.sharding.rank == 0
        with torch.inference_mode():
            self._graph_logits_SV = torch.empty(
                max(shape.num_sequences for shape in shapes),
                self._model.vocab_size if has_logits else 0,
                dtype=torch.float32,
                device=self._device,
            )
            for count, shape in enumerate(largest_first):
                progress(count / len(shapes))
                self._graphs[shape] = self._record(shape, recorder)
        progress(1.0)
        sizes = [shape.num_decodes for shape in shapes if not shape.num_chunks]
        self._decode_sizes = np.array(sizes)
        self._mixed_shapes = [shape for shape in shapes if shape.num_chunks]

    def compute(self, batch: ForwardBatch) -> StepHandle:
        with torch.inference_mode():
            shape = self._shape(batch)
            logits_SV, step, logprobs = self._replay(batch, shape) if shape else self._run(batch)
            # Masks and penalties need the full vocabulary, which only rank 0 has.
            if self._communicator.sharding.rank == 0:
                self._mask(batch.sampling, logits_SV)
                if batch.penalties is not None:
                    self._adjuster.begin(batch.penalties)
            if step.num_samples:
                if shape and step.excess_biases is None:
                    self._graphs[shape].sampler()
                else:
                    # With the padding, as on other ranks: they do not know of all biases.
                    self._sample(logits_SV, step.excess_biases)
            handle = self._to_host(step.num_samples, logprobs)
        self._buffer.mark_launched()
        return handle

    def close(self) -> None:
        """Destroy the graphs, for which NCCL waits when its communicator ends."""
        self._graphs.clear()
        self._samplers.clear()

    def logits(self, batch: ForwardBatch) -> Tensor:
        with torch.inference_mode():
            logits_SV, _, _ = self._run(batch)
        self._buffer.mark_launched()
        return logits_SV

    def _shape(self, batch: ForwardBatch) -> GraphShape | None:
        """The recorded shape to pad the batch to, or None to run it eagerly."""
        size = batch.num_decodes
        if not self._graphs:
            return None
        if size < batch.rows.size:
            # Prompt logprobs need all hidden states, which a graph does not keep.
            if batch.prompt_logprob_tokens.size:
                return None
            return next((shape for shape in self._mixed_shapes if shape.fits(batch)), None)
        found = int(np.searchsorted(self._decode_sizes, size))
        if found < len(self._decode_sizes):
            return GraphShape(int(self._decode_sizes[found]))
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "a step with %d sequences exceeds --cuda-graph-max-bs; such steps run without a "
                "CUDA graph, which is slower",
                size,
            )
        return None

    def _replay(
        self, batch: ForwardBatch, shape: GraphShape
    ) -> tuple[Tensor, SentStep, StepLogprobs | None]:
        step = self._buffer.send(batch, shape)
        self._attention.plan_for_graph(step)
        self._graphs[shape].forward()
        logits_SV = self._graph_logits_SV[: shape.num_sequences]
        return logits_SV, step, _begin_logprobs(batch, logits_SV)

    def _run(self, batch: ForwardBatch) -> tuple[Tensor, SentStep, StepLogprobs | None]:
        step = self._buffer.send(batch)
        self._attention.plan(step)
        num_sequences = step.num_decodes + step.num_prefills
        x_TC = self._hidden(num_sequences, step.num_tokens)
        logits_SV = self._logits(x_TC, step.num_samples)
        logprobs = _begin_logprobs(batch, logits_SV)
        if batch.prompt_logprob_tokens.size:
            tokens_Q = self._to_device(batch.prompt_logprob_tokens)
            add_prompt_in_slices(
                logprobs, tokens_Q, lambda tokens: self._model.logits(x_TC, tokens)
            )
        return logits_SV, step, logprobs

    def _hidden(self, num_sequences: int, num_tokens: int) -> Tensor:
        """The last hidden states [T, C] of the step whose words are on the device."""
        tensors = self._tensors
        self._kernels.expand(tensors, self._limits, num_sequences)
        self._attention.begin()
        return self._model.forward(tensors.ids_T[:num_tokens], tensors.positions_T[:num_tokens])

    def _logits(self, x_TC: Tensor, num_samples: int, out_SV: Tensor | None = None) -> Tensor:
        sample_tokens_S = self._tensors.words["sample_tokens"][:num_samples]
        return self._model.logits(x_TC, sample_tokens_S, out_SV)

    def _mask(self, columns: SamplingColumns, logits_SV: Tensor) -> None:
        if columns.grammar is not None:
            samples_G = self._to_device(columns.grammar.samples)
            masks_GW = self._to_device(columns.grammar.fill())
            self._kernels.mask(logits_SV, samples_G, masks_GW)

    def _sample(self, logits_SV: Tensor, excess_biases: TokenBiases | None = None) -> None:
        """Sample a token per row and keep them on the device as input of the next step."""
        tensors, size = self._tensors, logits_SV.shape[0]
        tokens_S = tensors.tokens_S[:size]
        if self._communicator.sharding.rank == 0:
            columns = tensors.columns(size, self._adjuster.counts_RV)
            if excess_biases is not None:
                biases = BiasColumns.from_host(excess_biases, self._device)
                columns = replace(columns, biases=biases)
            self._kernels.sample(logits_SV, columns, tokens_S)
        self._communicator.broadcast(tokens_S)
        rows_S = tensors.words["sample_rows"][:size].long()
        tensors.last_token.index_copy_(0, rows_S, tokens_S.long())

    def _record(self, shape: GraphShape, recorder: Recorder) -> _Graphs:
        """Both graphs of a shape, recorded with a step that is all padding.

        Shapes with equally many samples share a sampler.
        """
        step = self._buffer.send(_NO_SEQUENCES, shape)
        self._attention.plan_for_graph(step)
        size = shape.num_sequences
        logits_SV = self._graph_logits_SV[:size]
        out_SV = logits_SV if self._communicator.sharding.rank == 0 else None
        forward = recorder.record(
            lambda: self._logits(self._hidden(size, shape.num_tokens), size, out_SV)
        )
        forward()
        if size not in self._samplers:
            self._samplers[size] = recorder.record(lambda: self._sample(logits_SV))
        self._buffer.mark_launched()
        return _Graphs(forward, self._samplers[size])

    def _to_host(self, size: int, logprobs: StepLogprobs | None) -> StepHandle:
        host = self._results[self._next][:size]
        self._next = (self._next + 1) % _RESULTS_IN_FLIGHT
        tokens_S = self._tensors.tokens_S[:size]
        host.copy_(tokens_S, non_blocking=True)
        host_logprobs = None if logprobs is None else logprobs.finish(tokens_S).map(download)
        if self._device.type == "cpu":
            return StepHandle(host, host_logprobs, None)
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return StepHandle(host, host_logprobs, done)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return upload(array, self._device)


def _begin_logprobs(batch: ForwardBatch, logits_SV: Tensor) -> StepLogprobs | None:
    return None if batch.logprobs is None else StepLogprobs(logits_SV, batch.logprobs)


_NO_INTS = np.empty(0, np.int32)
_NO_FLOATS = np.empty(0, np.float32)
_NO_SEQUENCES = ForwardBatch(
    step_id=0,
    num_decodes=0,
    rows=_NO_INTS,
    query_lens=_NO_INTS,
    start_positions=_NO_INTS,
    prefill_ids=_NO_INTS,
    page_rows=_NO_INTS,
    page_columns=_NO_INTS,
    page_ids=_NO_INTS,
    sample_indices=_NO_INTS,
    sampling=SamplingColumns(
        temperature=_NO_FLOATS,
        top_p=_NO_FLOATS,
        top_k=_NO_INTS,
        min_p=_NO_FLOATS,
        seeds=np.empty(0, np.int64),
        choices=_NO_INTS,
        suppress_samples=_NO_INTS,
        suppress_ids=_NO_INTS,
    ),
)
