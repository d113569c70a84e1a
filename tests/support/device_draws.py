"""Tokens drawn by the sampling kernels, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minisrv.engine.forward_batch import SamplingColumns
from minisrv.engine.kernels import triton_filter
from minisrv.engine.kernels.triton_sample import sample_on_device
from minisrv.engine.sampling.device_columns import DeviceColumns
from minisrv.wire.arrays import Int64Array

CPU = torch.device("cpu")


def draw(logits: torch.Tensor, columns: SamplingColumns, positions: Int64Array) -> torch.Tensor:
    out = torch.full((logits.shape[0],), -1)
    given = DeviceColumns.from_host(columns, positions, CPU)
    return sample_on_device(logits.clone(), given, out)


class SearchCount:
    """Counts the rows whose tokens are not among the listed parts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        search = triton_filter.draw_filtered

        def counted(*args: Any) -> Any:
            self.rows += 1
            return search(*args)

        monkeypatch.setattr(triton_filter, "draw_filtered", counted)
