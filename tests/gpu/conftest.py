"""Everything in this folder is marked `gpu`. Without a GPU only what is marked `also_cpu` runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not item.get_closest_marker("also_cpu"):
                item.add_marker(skip)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The GPU. Without one a CPU, on which engines compute their steps as on a GPU, with torch in
    the place of FlashInfer's and our kernels.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.importorskip("flashinfer")
    from tests.support.device_parts import use_device_runner

    use_device_runner(monkeypatch)
    return torch.device("cpu")
