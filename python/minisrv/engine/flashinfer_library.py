"""The one place that imports FlashInfer, which takes seconds and has to be configured before."""

from __future__ import annotations

import os
from typing import Any

from minisrv.engine.cuda_paths import set_cuda_paths


def import_flashinfer() -> Any:
    """The module `flashinfer`. Raises ImportError if it is not installed."""
    set_cuda_paths()
    # Otherwise its norms are other kernels wherever nvidia-cutlass-dsl happens to be installed.
    os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")
    import flashinfer

    return flashinfer
