"""What is known of GPUs by name, from their data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from minisrv.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GPU:
    """usable_gib: about what the driver leaves to programs. bandwidth: bytes/s of its memory.

    num_sms: multiprocessors, on which the size of FlashInfer's workspace depends. flops: of dense
    bfloat16 products with float32 sums, per second. link: bytes/s to other GPUs, one way.
    """

    name: str
    usable_gib: float
    bandwidth: float
    num_sms: int
    flops: float
    link: float


GPUS = (
    GPU("B200", 178.4, 8.0e12, 148, 2250e12, 900e9),
    GPU("H200", 139.8, 4.8e12, 132, 989e12, 450e9),
    GPU("H100 80GB", 79.1, 3.35e12, 132, 989e12, 450e9),
    GPU("H100 PCIe", 79.1, 2.0e12, 114, 756e12, 64e9),
    GPU("A100 80GB", 79.1, 2.0e12, 108, 312e12, 300e9),
    GPU("A100 40GB", 39.4, 1.555e12, 108, 312e12, 300e9),
    GPU("L40S", 44.4, 0.864e12, 142, 362e12, 32e9),
    GPU("L4", 22.0, 0.3e12, 58, 121e12, 32e9),
    GPU("RTX 5090", 31.4, 1.79e12, 170, 209.5e12, 64e9),
    GPU("RTX 4090", 23.6, 1.008e12, 128, 165.2e12, 32e9),
    GPU("RTX 3090", 23.6, 0.936e12, 82, 71e12, 32e9),
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
