"""A sweep as a picture: four panels over its first option, a line for each value of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from minisrv.simulation.records import Figures
from minisrv.simulation.sweep import Result, describe

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP_X, _GAP_Y = 330, 190, 60, 34, 80, 64
_COLORS = ("#2471a3", "#c0392b", "#1e8449", "#b9770e", "#6c3483", "#117a65", "#7f8c8d", "#212f3d")


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    value: Callable[[Figures], float]
    logarithmic: bool = False
    top: float | None = None


_PANELS = (
    _Panel("requests within the bounds, %", lambda f: 100 * f.good_share, top=100),
    _Panel("time to first token, p90, s", lambda f: f.ttft_p90, logarithmic=True),
    _Panel("between tokens, p99, ms", lambda f: 1000 * f.itl_p99, logarithmic=True),
    _Panel("prefix cache hit rate, %", lambda f: 100 * f.hit_rate),
)

Line = list[tuple[float, Figures]]


def draw(results: Sequence[Result]) -> str:
    """The results, which have a point each, as SVG."""
    name = next(iter(results[0].point))
    values = list(dict.fromkeys(result.point[name] for result in results))
    lines: dict[str, Line] = {}
    for result in results:
        rest = {key: value for key, value in result.point.items() if key != name}
        at = (values.index(result.point[name]) + 0.5) / len(values)
        lines.setdefault(describe(rest), []).append((at, result.figures))
    width = _LEFT + 2 * _WIDTH + _GAP_X + 20
    rows = math.ceil(len(_PANELS) / 2)
    legend_top = _TOP + rows * (_HEIGHT + _GAP_Y)
    height = legend_top + 18 * (len(lines) if len(lines) > 1 else 0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(_PANELS):
        left = _LEFT + number % 2 * (_WIDTH + _GAP_X)
        top = _TOP + number // 2 * (_HEIGHT + _GAP_Y)
        parts += _draw_panel(panel, list(lines.values()), (name, values), left, top)
    if len(lines) > 1:
        for number, label in enumerate(lines):
            y, color = legend_top + 18 * number, _COLORS[number % len(_COLORS)]
            parts.append(f'<rect x="{_LEFT}" y="{y - 9}" width="14" height="9" fill="{color}"/>')
            parts.append(_text(_LEFT + 20, y, label, "start"))
    return "\n".join([*parts, "</svg>", ""])


def _draw_panel(
    panel: _Panel, lines: list[Line], axis: tuple[str, list[str]], left: float, top: float
) -> list[str]:
    """The axes of a panel, whose left upper corner is given, and its lines."""
    found = [panel.value(figures) for line in lines for _, figures in line]
    low, high = _range(found, panel)
    bottom = top + _HEIGHT

    def y_of(value: float) -> float:
        if panel.logarithmic:
            share = math.log(max(value, low) / low) / math.log(high / low)
        else:
            share = (value - low) / (high - low)
        return bottom - _HEIGHT * share

    parts = [_text(left, top - 10, panel.title, "start")]
    for tick in _ticks(low, high, panel.logarithmic):
        y = y_of(tick)
        parts.append(
            f'<line x1="{left}" x2="{left + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        )
        parts.append(_text(left - 6, y + 4, f"{tick:g}", "end"))
    name, values = axis
    for number, value in enumerate(values):
        x = left + _WIDTH * (number + 0.5) / len(values)
        parts.append(_text(x, bottom + 16, value, "middle"))
    parts.append(_text(left + _WIDTH / 2, bottom + 32, name, "middle"))
    for number, line in enumerate(lines):
        color = _COLORS[number % len(_COLORS)]
        dots = [(left + _WIDTH * at, y_of(panel.value(figures))) for at, figures in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in dots]
    return parts


def _range(found: list[float], panel: _Panel) -> tuple[float, float]:
    """The values at the lower and the upper edge."""
    if not panel.logarithmic:
        return 0.0, panel.top or max(found) * 1.1 or 1.0
    positive = [value for value in found if value > 0] or [1.0]
    low = 10 ** math.floor(math.log10(min(positive)))
    return low, 10 ** max(math.ceil(math.log10(max(positive))), math.log10(low) + 1)


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    if logarithmic:
        decades = round(math.log10(high / low))
        return [low * 10**n for n in range(decades + 1)]
    step = 10 ** math.floor(math.log10(high - low))
    while (high - low) / step > 5:
        step *= 2
    while (high - low) / step < 3:
        step /= 2
    return [low + step * n for n in range(int((high - low) / step + 1e-9) + 1)]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
