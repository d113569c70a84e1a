"""The GPUs that `minisrv plan` knows by name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from minisrv.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GPU:
    """usable_gib: about what the driver leaves to programs. bandwidth: bytes/s (data sheet)."""

    name: str
    usable_gib: float
    bandwidth: float


GPUS = (
    GPU("B200", 178.4, 8.0e12),
    GPU("H200", 139.8, 4.8e12),
    GPU("H100 80GB", 79.1, 3.35e12),
    GPU("H100 PCIe", 79.1, 2.0e12),
    GPU("A100 80GB", 79.1, 2.0e12),
    GPU("A100 40GB", 39.4, 1.555e12),
    GPU("L40S", 44.4, 0.864e12),
    GPU("L4", 22.0, 0.3e12),
    GPU("RTX 5090", 31.4, 1.79e12),
    GPU("RTX 4090", 23.6, 1.008e12),
    GPU("RTX 3090", 23.6, 0.936e12),
)


def find_gpu(name: str) -> GPU:
    """The GPU called `name`, whatever its spacing and case; H100 and A100 mean the 80GB models.

    Raises ConfigError for an unknown name.
    """
    by_name = {_plain(gpu.name): gpu for gpu in GPUS}
    gpu = by_name.get(_plain(name)) or by_name.get(_plain(name) + "80gb")
    if gpu is None:
        raise ConfigError(
            f"--gpu is {name!r}; known GPUs are {', '.join(gpu.name for gpu in GPUS)}; "
            "for any other use --gpu-memory"
        )
    return gpu


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia")
