"""The time of a step as a sum of rates, which are fitted to measurements of a server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from minisrv.errors import ConfigError
from minisrv.simulation.replica import ServerShape
from minisrv.simulation.step_times import StepWork

_FIRST_TOKENS = 4


@dataclass(frozen=True, slots=True)
class LinearStepTimes:
    """Seconds of each step, and for each count of `StepWork`: in all, of host and engine.

    first_token: what each of a step's first tokens, up to _FIRST_TOKENS, takes beyond the others;
    a processor computes a single one with other operations than a batch.
    """

    step: float = 0.0
    first_token: float = 0.0
    prefill_token: float = 0.0
    prefill_pair: float = 0.0
    decode: float = 0.0
    decode_context: float = 0.0

    def host_s(self, work: StepWork) -> float:
        """See StepTimes."""
        return 0.0

    def device_s(self, work: StepWork) -> float:
        """See StepTimes."""
        return (
            self.step
            + self.first_token * min(work.decodes + work.prefill_tokens, _FIRST_TOKENS)
            + self.prefill_token * work.prefill_tokens
            + self.prefill_pair * work.prefill_pairs
            + self.decode * work.decodes
            + self.decode_context * work.decode_context
        )


@dataclass(frozen=True, slots=True)
class Observation:
    """Measured seconds of steps that compute this work in all."""

    steps: float
    prefill_tokens: float
    prefill_pairs: float
    decodes: float
    decode_context: float
    seconds: float

    @property
    def counts(self) -> list[float]:
        """In the order of the rates; each step has _FIRST_TOKENS tokens, or there is only one."""
        first = min(self.decodes + self.prefill_tokens, _FIRST_TOKENS * self.steps)
        counts = (self.steps, first, self.prefill_tokens, self.prefill_pairs)
        return [*counts, self.decodes, self.decode_context]


def fit(observations: Sequence[Observation]) -> LinearStepTimes:
    """The rates, none negative, with the least squares of relative errors.

    Solves for every subset of the rates and takes the best without a negative one.
    """
    counts = np.array([o.counts for o in observations], np.float64)
    seconds = np.array([o.seconds for o in observations], np.float64)
    rows, best, least = counts / seconds[:, None], np.zeros(counts.shape[1]), np.inf
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    for size in range(1, rows.shape[1] + 1):
        for chosen in map(list, combinations(range(rows.shape[1]), size)):
            solution = np.linalg.lstsq(rows[:, chosen] / scale[chosen], np.ones(len(rows)))[0]
            rates = np.zeros(rows.shape[1])
            rates[chosen] = solution / scale[chosen]
            error = float(((rows @ rates - 1) ** 2).sum())
            if (rates >= 0).all() and error < least * (1 - 1e-9):
                best, least = rates, error
    return LinearStepTimes(*best.tolist())


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is known of a running server: enough to simulate it."""

    model: str
    shape: ServerShape
    times: LinearStepTimes
    observations: list[Observation]

    def errors(self) -> list[float]:
        """By how much the fitted time of each observation is too long, as a share of it."""
        rates = list(asdict(self.times).values())
        fitted = [float(np.dot(o.counts, rates)) for o in self.observations]
        return [f / o.seconds - 1 for f, o in zip(fitted, self.observations, strict=True)]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote. Raises ConfigError."""
        try:
            saved = json.loads(path.read_text())
            return cls(
                str(saved["model"]),
                ServerShape(**saved["shape"]),
                LinearStepTimes(**saved["times"]),
                [Observation(**values) for values in saved["observations"]],
            )
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not a calibration: {error}") from None
