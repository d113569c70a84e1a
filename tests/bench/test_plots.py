"""Pictures are drawn from results with one load or several, or without samples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from minisrv.bench.load import Load
from minisrv.bench.measures import Bounds, summarize
from minisrv.bench.plots import check_plot, plot
from minisrv.bench.runner import Run
from minisrv.errors import ConfigError
from tests.bench.test_measures import OUTCOMES


def result(*loads: Load) -> dict[str, Any]:
    points = [
        {"load": load.to_json(), **summarize(Run(outcomes, 2.0, 0.1, 0), Bounds({}))}
        for load, outcomes in zip(loads, [OUTCOMES, [], OUTCOMES[:1]], strict=False)
    ]
    options = {"url": "http://127.0.0.1:8000"}
    return {"points": points, "model": "m", "options": options, "started_at": "now"}


@pytest.mark.parametrize("loads", [[Load(1), Load(4), Load(8)], [Load(rate=0.5)], [Load()]])
def test_an_svg_shows_every_load(loads: list[Load], tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    path = tmp_path / "picture.svg"
    check_plot(path)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot(result(*loads), path)
    text = path.read_text()
    names = {Load(1): "concurrency 1", Load(rate=0.5): "0.5 requests/s", Load(): "as recorded"}
    assert names[loads[0]] in text
    assert "concurrency 8" in text or len(loads) == 1
    assert ("requests sent per second" in text) == (loads[0].rate is not None)
    for title in ("throughput", "TTFT: time to first token", "E2E: end to end"):
        assert title in text


def test_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(result(Load(1), Load(2)), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"needs matplotlib: pip install 'minisrv\[bench\]'"):
        check_plot(Path("a.png"))


def test_another_form_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must end in \.png or \.svg"):
        check_plot(Path("a.pdf"))
