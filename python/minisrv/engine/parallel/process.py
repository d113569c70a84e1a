"""The process of a rank above 0: it has its part of the model and computes what rank 0 plans."""

from __future__ import annotations

from pathlib import Path

from minisrv.supervision.child_main import Child, run_child
from minisrv.supervision.records import ChildReady


def main() -> None:
    """Be a rank."""
    run_child("rank", _follow)


def _follow(child: Child) -> None:
    from minisrv.checkpoint.model_config import load_model_config
    from minisrv.engine.engine import Engine
    from minisrv.engine.parallel.plan_pipe import read_plans
    from minisrv.engine.parallel.ranks import JOINING

    model_dir, boot = Path(child.boot.model_dir), child.boot
    model_config = load_model_config(model_dir, child.config.max_seq_len)
    child.report_progress(JOINING, 0.0)
    engine = Engine.follower(child.config, model_dir, model_config, boot.index, Path(boot.run_dir))
    child.report(ChildReady())
    with open(boot.fds["plan"], "rb") as pipe:
        for batch in read_plans(pipe):
            engine.follow(batch)
