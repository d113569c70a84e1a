"""The process that prepares a model before the engine starts.

It converts the tokenizer if the boot record has a `tokenizer_dir`, otherwise downloads the model.
"""

from __future__ import annotations

import os
from pathlib import Path

from minisrv.checkpoint.convert_tokenizer import convert
from minisrv.checkpoint.hub import resolve_model
from minisrv.supervision.child_main import Child, run_child
from minisrv.supervision.records import ChildReady


def _prepare(child: Child) -> None:
    facts = {}
    if child.boot.tokenizer_dir:
        convert(Path(child.boot.model_dir), Path(child.boot.tokenizer_dir))
    else:
        # The supervisor shows the progress.
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        facts["model_dir"] = str(resolve_model(child.config.model, child.report_progress))
    child.report(ChildReady(facts))


if __name__ == "__main__":
    run_child("preparation", _prepare)
