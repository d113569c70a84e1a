"""The process that downloads a model from the hub before the engine starts."""

from __future__ import annotations

from minisrv.checkpoint.hub import resolve_model
from minisrv.supervision.child_main import Child, run_child
from minisrv.supervision.records import ChildReady


def _download(child: Child) -> None:
    path = resolve_model(child.config.model, child.report_progress)
    child.report(ChildReady({"model_dir": str(path)}))


if __name__ == "__main__":
    run_child("hub", _download)
