"""What the layers need of an attention backend."""

# Shapes: T tokens in the step, H query heads, K key-value heads, D head size.

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.page_table import PageTable


class AttentionBackend(Protocol):
    """Causal attention over paged keys and values."""

    def plan(self, batch: ForwardBatch, page_table: PageTable) -> None:
        """Prepare what the layers of one step share; the batch's page writes are in the table."""

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer_id: int) -> Tensor:
        """Store the step's keys and values, then attend: a new tensor [T, H, D]."""
