"""The process that converts a tokenizer to tokenizer.json before the engine starts."""

from __future__ import annotations

from pathlib import Path

from minisrv.checkpoint.convert_tokenizer import convert
from minisrv.supervision.child_main import Child, run_child
from minisrv.supervision.records import ChildReady


def _convert(child: Child) -> None:
    convert(Path(child.boot.model_dir), Path(child.boot.tokenizer_dir))
    child.report(ChildReady())


if __name__ == "__main__":
    run_child("converter", _convert)
