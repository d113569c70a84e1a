"""The conversion of a tokenizer as a child of the supervisor."""

from __future__ import annotations

from pathlib import Path

from minisrv.child import Child, Ready, run_child
from minisrv.tokenizer.convert import convert


def _convert(child: Child) -> None:
    convert(Path(child.boot.model_dir), Path(child.boot.tokenizer_dir))
    child.report(Ready())


if __name__ == "__main__":
    run_child("converter", _convert)
