"""GPUs that a plan can be made for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from minisrv.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GPU:
    """usable_gib: about what the driver gives programs. bandwidth: bytes/s, by data sheet."""

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


def find_card(name: str) -> GPU:
    """The card of that name, however it is spaced and capitalised; H100 and A100 are of 80GB."""
    wanted = _plain(name)
    for exact in (True, False):
        for card in GPUS:
            known = _plain(card.name)
            if known == wanted or (not exact and known == wanted + "80gb"):
                return card
    raise ConfigError(
        f"--card is {name!r}; known are {', '.join(card.name for card in GPUS)}; "
        "for another give --card-memory"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia")
