"""The one place that imports FlashInfer, which takes seconds."""

from __future__ import annotations

from typing import Any


def import_flashinfer() -> Any:
    """The module `flashinfer`. Raises ImportError if it is not installed."""
    import flashinfer

    return flashinfer
