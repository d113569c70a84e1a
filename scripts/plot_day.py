"""Draw the samples of `make soak PART=day`: python scripts/plot_day.py SAMPLES.json PICTURE.svg.

Two panels share the time axis: the memory and the open file descriptors of each kind of process.
Dashed lines mark deaths.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

WIDTH, PANEL, LEFT, RIGHT, GAP, TOP = 860, 200, 60, 110, 50, 30
COLORS = {
    "scheduler": "#c0392b",
    "frontend": "#2471a3",
    "tokenizer": "#1e8449",
    "detokenizer": "#b9770e",
    "supervisor": "#6c3483",
}
PANELS = (("memory, MiB", 2), ("file descriptors", 3))


def draw(day: dict[str, Any]) -> str:
    """The picture as SVG. `day` has `samples` and `kills` as tests/soak/test_day.py writes them."""
    samples, kills = day["samples"], day["kills"]
    seconds = max(sample[0] for sample in samples)
    height = TOP + 2 * PANEL + GAP + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for number, (title, column) in enumerate(PANELS):
        top = TOP + number * (PANEL + GAP)
        parts += _panel(samples, kills, seconds, title, column, top)
    for minute in range(0, int(seconds / 60) + 1, 5):
        x = _x(minute * 60, seconds)
        parts.append(_text(x, height - 15, f"{minute} min", "middle"))
    return "\n".join([*parts, "</svg>", ""])


def _panel(
    samples: list[Any], kills: list[Any], seconds: float, title: str, column: int, top: float
) -> list[str]:
    highest = max(sample[column] for sample in samples) * 1.1
    parts = [_text(LEFT, top - 8, title, "start")]
    for share in (0.0, 0.5, 1.0):
        y = top + PANEL * (1 - share)
        line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        parts += [line, _text(LEFT - 6, y + 4, f"{highest * share:.0f}", "end")]
    for at, _, _ in kills:
        x = _x(at, seconds)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + PANEL}" stroke="#999" '
            'stroke-dasharray="2 3"/>'
        )
    for row, (kind, color) in enumerate(COLORS.items()):
        points = " ".join(
            f"{_x(one[0], seconds):.1f},{top + PANEL * (1 - one[column] / highest):.1f}"
            for one in samples
            if one[1] == kind
        )
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.3"/>',
            f'<text x="{WIDTH - RIGHT + 8}" y="{top + 12 + 16 * row}" fill="{color}">{kind}</text>',
        ]
    return parts


def _x(at: float, seconds: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * at / seconds


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(draw(json.loads(source.read_text())))
