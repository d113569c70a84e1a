"""Programmatic dependent launch: a kernel is launched while the kernel before it still runs.

Its programs then wait until that one has finished, so only the launch itself is hidden. This is
right for a chain of kernels under two rules, which `begin` keeps. A program waits before it touches
memory: the kernel before it, and with that all earlier ones, has then finished. And it allows the
next launch only after this, so no more than two kernels overlap. Kernels of torch are launched
without it, and begin when everything before them has finished. FlashInfer's keep both rules, except
that its attention reads the tables of a plan before it waits; these are written long before.

Off unless `set_programmatic_launch` turns it on, for the whole process.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_is_on = False


def set_programmatic_launch(is_on: bool) -> None:
    """Of all kernels that are launched, or recorded in CUDA graphs, from now on.

    It requires compute capability 9.0.
    """
    global _is_on
    _is_on = is_on


@triton.jit
def begin(PDL: tl.constexpr) -> None:
    """The first statement of every kernel."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def dependent() -> dict[str, bool]:
    """Arguments of every launch."""
    return {"PDL": True, "launch_pdl": True} if _is_on else {"PDL": False}
