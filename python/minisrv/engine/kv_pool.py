"""The memory of the KV cache. Ownership of pages is tracked in kvcache/, not here."""

# Shapes: L layers, N pages, P page size, K key-value heads, D head size.

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from minisrv.checkpoint.model_config import ModelConfig

_TOUCHED_BYTES = 256 * 2**20


class KVPool:
    """A pair of tensors, keys and values, per layer.

    They are computed in `dtype` and stored in `stored_dtype`: the same, bfloat16, or FP8 with a
    scale of 1.
    `pages` are views [N, P, K, D] and `slots` views [N * P, K, D] of the same memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_kv_heads: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        stored_dtype: torch.dtype | None = None,
    ) -> None:
        self._page_shape = (page_size, num_kv_heads, config.head_dim)
        self._num_layers, self.dtype, self.device = config.num_layers, dtype, device
        self.stored_dtype = stored_dtype or dtype
        self.page_size, self.num_kv_heads, self.head_dim = self._page_shape
        self.num_pages = 0
        self.pages: list[tuple[Tensor, Tensor]] = []
        self.slots: list[tuple[Tensor, Tensor]] = []

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page, summed over layers."""
        return 2 * self._num_layers * math.prod(self._page_shape) * self.stored_dtype.itemsize

    @property
    def unmapped_bytes(self) -> int:
        """Of the cache on a CPU: what the operating system maps later, at its first use."""
        mapped = min(self.num_pages, self._num_touched)
        return (self.num_pages - mapped) * self.bytes_per_page

    @property
    def _num_touched(self) -> int:
        """Pages that are touched when they are allocated, on a CPU."""
        return _TOUCHED_BYTES // self.bytes_per_page

    def allocate(self, num_pages: int, spare: int = 0) -> None:
        """Allocate `num_pages + spare` pages; the memory of an earlier call is freed."""
        self.num_pages = num_pages
        self.pages, self.slots = [], []
        num_pages += spare
        self.pages = list(zip(self._zeros(num_pages), self._zeros(num_pages), strict=True))
        self.slots = [(keys.flatten(0, 1), values.flatten(0, 1)) for keys, values in self.pages]

    def _zeros(self, num_pages: int) -> Tensor:
        """Zeros, so that a masked slot never holds a NaN.

        On a CPU the operating system maps memory at its first use, which takes about 2 ms per MiB:
        the pages that are allocated first are touched here, so that no step has to wait for that.
        """
        shape = (self._num_layers, num_pages, *self._page_shape)
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.stored_dtype, device=self.device)
        raw = np.zeros(math.prod(shape) * self.stored_dtype.itemsize, np.uint8)
        zeros = torch.from_numpy(raw).view(self.stored_dtype).view(shape)
        zeros[:, : self._num_touched] = 0
        return zeros
