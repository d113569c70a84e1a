"""How long a soak is: SOAK_SCALE multiplies the sizes, SOAK_SEED chooses other inputs."""

from __future__ import annotations

import os

SCALE = float(os.environ.get("SOAK_SCALE", "1"))
SEED = int(os.environ.get("SOAK_SEED", "0"))


def scaled(size: int) -> int:
    """`size` at the scale of this run, at least 1."""
    return max(1, round(size * SCALE))
