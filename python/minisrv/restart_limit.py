"""How many deaths of processes a server or an `LLM` survives: --restart-limit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from minisrv.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RestartLimit:
    """The end comes with death number `deaths` within `seconds`; if it is 0, with the first."""

    deaths: int
    seconds: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """The limit that 3/60 (three deaths in 60 seconds) or 0 stands for. Raises ConfigError."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9}(?:\.\d{1,9})?)", text, re.ASCII)
        if match is not None and float(match[2]) > 0:
            return cls(int(match[1]), float(match[2]))
        if text == "0":
            return cls(0, 0.0)
        raise ConfigError(
            f"--restart-limit is {text!r}; it must be deaths/seconds, such as 3/60, or 0"
        )

    def allows_restart(self, deaths: Sequence[float]) -> bool:
        """Whether to go on after the last of `deaths`, times in seconds in ascending order."""
        recent = [at for at in deaths if at > deaths[-1] - self.seconds]
        return len(recent) < self.deaths
