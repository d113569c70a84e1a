"""The interface between the layers and an attention backend."""

# Shapes: T tokens in the step, H query heads, K key-value heads, D head size.

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.kernels.base import CacheSlots
from minisrv.engine.page_table import PageTable


class LayerAttention(Protocol):
    """Causal attention over paged keys and values, as the layers of a planned step call it."""

    def cache_slots(self, layer_id: int) -> CacheSlots:
        """Where the layer must store the step's keys and values before it calls `forward`."""

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, layer_id: int) -> Tensor:
        """Attend to the cache and the step's own keys and values: a contiguous [T, H, D]."""


class AttentionBackend(LayerAttention, Protocol):
    """Attention that is planned from the page table on the host."""

    def plan(self, batch: ForwardBatch, page_table: PageTable) -> None:
        """Prepare what all layers of a step share. The batch's page writes are already applied."""
