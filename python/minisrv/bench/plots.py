"""Pictures of a result: throughput over load, and the distributions of the latencies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisrv.bench.measures import Json
from minisrv.bench.report import MEANINGS, load_name
from minisrv.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Raises ConfigError if a picture cannot be drawn there, before anything is measured."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"--plot {path}: the name must end in {' or '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'minisrv[bench]'") from None


def plot(result: Json, path: Path) -> None:
    """Draw all loads of a result into a PNG or SVG file.

    A panel for the throughput over the loads, and one for each latency: which share of the samples
    is at most so long.
    """
    from matplotlib.figure import Figure

    points = result["points"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 3).flat
    _draw_throughput(axes[0], points)
    for panel, (name, title) in zip(axes[1:], MEANINGS.items(), strict=False):
        _draw_distribution(panel, points, name, f"{name.upper()}: {title}")
    axes[5].axis("off")
    axes[5].legend(*axes[1].get_legend_handles_labels(), loc="upper left", frameon=False)
    options = result["options"]
    figure.suptitle(f"{result['model']} at {options['url']}, {result['started_at']}")
    figure.savefig(path, dpi=120)


def _draw_throughput(axes: Axes, points: Sequence[Json]) -> None:
    loads = [_load_of(point) for point in points]
    rates = [point["rates"]["output_tokens"] for point in points]
    axes.plot(loads, rates, marker="o")
    axes.set(title="throughput", xlabel=_load_label(points), ylabel="output tokens/s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _draw_distribution(axes: Axes, points: Sequence[Json], name: str, title: str) -> None:
    for point in points:
        curve: list[float] = point["latencies"][name].get("curve", [])
        # Without samples an empty line, so that all panels have the same colours.
        axes.plot([value * 1000 for value in curve], range(len(curve)), label=load_name(point))
    axes.set(title=title, xlabel="ms", ylabel="% of samples")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)


def _load_of(point: Json) -> Any:
    load = point["load"]
    return load["concurrency"] or load["rate"] or load_name(point)


def _load_label(points: Sequence[Json]) -> str:
    load = points[0]["load"]
    if load["concurrency"] is not None:
        return "requests at once"
    return "" if load["rate"] is None else "requests sent per second"
