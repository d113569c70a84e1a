"""The interface between the engine and what computes its steps, on the host or on the device."""

# Shapes: S sequences that sample, V vocabulary.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.sampling.logprobs import LogprobTensors


@dataclass(frozen=True, slots=True)
class StepHandle:
    """A launched step. The tensors are in host memory and valid once `done` has completed."""

    token_ids_S: Tensor
    logprobs: LogprobTensors | None
    done: Any  # a CUDA event, or None


class StepRunner(Protocol):
    """Computes steps in the order in which they are launched."""

    def compute(self, batch: ForwardBatch) -> StepHandle:
        """Launch a step; on a CPU the step has finished when this returns."""

    def logits(self, batch: ForwardBatch) -> Tensor:
        """Run the forward without sampling: logits [S, V] of the sequences that sample."""
