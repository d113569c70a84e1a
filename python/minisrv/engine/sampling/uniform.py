"""One uniform number per sample, a function only of (seed, choice, position)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from minisrv.wire.arrays import Int32Array, Int64Array

UInt64Array = npt.NDArray[np.uint64]
Float64Array = npt.NDArray[np.float64]


def uniforms(seeds: Int64Array, choices: Int32Array, positions: Int64Array) -> Float64Array:
    """Independent numbers in [0, 1), [S], by SplitMix64's finaliser (Steele, Lea and Flood, 2014).

    They have 52 random bits, so that in float64 a number times a sum is always less than the sum.
    """
    with np.errstate(over="ignore"):
        state = _mix(seeds.view(np.uint64))
        state = _mix(state ^ choices.astype(np.uint64))
        state = _mix(state ^ positions.astype(np.uint64))
    return (state >> np.uint64(12)).astype(np.float64) * np.float64(2.0**-52)


def _mix(value: UInt64Array) -> UInt64Array:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
