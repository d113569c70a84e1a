"""Several simulations of one trace, which differ in some options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from minisrv.errors import ConfigError
from minisrv.simulation.records import Figures

Point = dict[str, str]  # option without dashes, value


@dataclass(frozen=True, slots=True)
class Result:
    """The figures of one point. gpus: of all servers together."""

    point: Point
    gpus: int
    figures: Figures

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"point": self.point, "gpus": self.gpus, **self.figures.to_dict()}


def expand(sweeps: Iterable[str]) -> list[Point]:
    """All combinations of NAME=VALUE,VALUE texts; one empty point if there are none.

    Raises ConfigError.
    """
    values: dict[str, list[str]] = {}
    for text in sweeps:
        name, equals, rest = text.partition("=")
        given = [value for value in rest.split(",") if value]
        if not name or not equals or not given:
            raise ConfigError(f"--sweep is {text!r}; an example is replicas=1,2,4")
        name = name.removeprefix("--").replace("_", "-")
        if name in values:
            raise ConfigError(f"--sweep has {name} twice")
        values[name] = given
    return [dict(zip(values, point, strict=True)) for point in product(*values.values())]


def flags(point: Point) -> list[str]:
    """The point as command line."""
    return [f"--{name}={value}" for name, value in point.items()]


def cheapest(results: Sequence[Result], share: float) -> Result | None:
    """The fewest GPUs with which at least `share` of the requests are good; of several the best."""
    enough = [result for result in results if result.figures.good_share >= share]
    return min(enough, key=lambda r: (r.gpus, -r.figures.good_share), default=None)


def table(results: Sequence[Result]) -> str:
    """One row for each point."""
    rows = [[*results[0].point, *_COLUMNS]]
    rows += [[*r.point.values(), *_cells(r.figures)] for r in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def describe(point: Mapping[str, str]) -> str:
    """The point in a line."""
    return ", ".join(f"{name} {value}" for name, value in point.items())


_COLUMNS = (
    *("TTFT p50", "p90", "p99", "ITL p50", "p90", "p99"),
    *("hits", "preempted", "refused", "busy", "good", "good/s"),
)


def _cells(figures: Figures) -> list[str]:
    f = figures
    times = (f.ttft_p50, f.ttft_p90, f.ttft_p99, f.itl_p50, f.itl_p90, f.itl_p99)
    counts = [f"{f.hit_rate:.1%}", str(f.preemptions), str(f.refused), f"{f.busy:.0%}"]
    return [*(f"{s:.3g}" for s in times), *counts, f"{f.good_share:.1%}", f"{f.goodput:.3g}"]
