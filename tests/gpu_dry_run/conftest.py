"""The dry run needs FlashInfer's planner, which nvcc compiles."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _planner() -> None:
    pytest.importorskip("triton")
    pytest.importorskip("flashinfer")
    from tests.gpu_dry_run.planner import Unavailable, load_planner

    if torch.cuda.is_available():
        pytest.skip("there is a GPU: see tests/gpu")
    try:
        load_planner()
    except Unavailable as error:
        pytest.skip(str(error))
