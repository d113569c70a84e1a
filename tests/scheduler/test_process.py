"""The scheduler's process, in this one: what it does once the loop is built."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minisrv.checkpoint.hub import resolve_model
from minisrv.config import ServerConfig
from minisrv.engine.engine import Engine
from minisrv.scheduler import build, process
from minisrv.start_progress import no_progress
from minisrv.supervision.progress import NoProgress


@pytest.fixture
def _unfrozen() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_unfrozen")
def test_collections_leave_out_what_exists_before_the_first_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = []
    engine: Any = Engine.__new__(Engine)
    engine.placement = engine.describe = lambda: "nowhere"
    loop = SimpleNamespace(
        engine=engine,
        scheduler=SimpleNamespace(max_seq_len=100),
        run=lambda check: frozen.append(gc.get_freeze_count()),
    )
    monkeypatch.setattr(build, "build_loop", lambda *arguments: loop)
    demo = resolve_model("demo", no_progress)
    child: Any = SimpleNamespace(
        config=ServerConfig(),
        boot=SimpleNamespace(model_dir=demo, run_dir=tmp_path, tokenizer_dir=demo, epoch=0),
        report=lambda report: frozen.append(gc.get_freeze_count()),
        handle_notices=lambda handle: None,
        open_progress=lambda: NoProgress(),
        report_progress=no_progress,
    )
    process._serve(child)
    assert len(frozen) == 2
    assert min(frozen) > 1000
