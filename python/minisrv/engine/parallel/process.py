"""The process of a rank above 0, which computes the steps that rank 0 sends it."""

from __future__ import annotations

import threading
from pathlib import Path

from minisrv.supervision.child_main import Child, end_start, run_child
from minisrv.supervision.records import ChildReady


def main() -> None:
    run_child("rank", _follow)


def _follow(child: Child) -> None:
    from minisrv.checkpoint.model_config import load_model_config
    from minisrv.engine.parallel.communicator import PeerFailedError, TPGroup
    from minisrv.engine.parallel.plan_pipe import read_plans
    from minisrv.engine.parallel.ranks import JOINING
    from minisrv.engine.parallel.shard import Sharding
    from minisrv.engine.rank_engine import RankEngine, choose_device

    config, boot = child.config, child.boot
    model_dir = Path(boot.model_dir)
    model_config = load_model_config(model_dir, config.max_seq_len)
    device = choose_device(config, boot.index)
    child.report_progress(JOINING, 0.0)
    sharding, run_dir = Sharding(boot.index, config.tp), Path(boot.run_dir)
    group = TPGroup(sharding, run_dir, device, config.one_shot_all_reduce_kib)
    try:
        engine = RankEngine(config, model_dir, model_config, group, device)
    except PeerFailedError:
        threading.Event().wait()  # rank 0 ends this process once it knows why
    end_start()
    child.report(ChildReady())
    with open(boot.fds["plan"], "rb") as pipe:
        for batch in read_plans(pipe):
            engine.runner.compute(batch)
    engine.close()
