"""How many launches a step takes, and calls of torch: the figures in launches.json, exactly.

A launch is an operation of torch, a Triton kernel or a kernel of FlashInfer. Layers are alike, so
two and three of them give the figures of the whole model. To write the file anew:
`python -m tests.gpu_dry_run.test_launches`, or with names of models only theirs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from minisrv.engine import model_size
from tests.gpu_dry_run.dry_run import decode_batch, dry_run, step_batch
from tests.gpu_dry_run.models import MODELS, Model

BATCHES = (1, 64, 256)
GOLDEN = Path(__file__).with_name("launches.json")
Figures = dict[str, dict[str, int]]


def measure(model: Model, folder: Path, num_layers: int | None) -> Figures:
    """Launches of a decode step, plain and with every filter and penalty, by batch size; and of a
    step with prompts, with the calls of torch and the launches by the host that it takes.
    """
    with (
        mock.patch.object(model_size, "graph_sizes", return_value=list(BATCHES)),
        dry_run(model, folder, num_layers=num_layers) as run,
    ):
        figures = {
            kind: {
                str(size): run.launches(decode_batch(size, adjusted=adjusted)).total()
                for size in BATCHES
            }
            for kind, adjusted in (("plain", False), ("filters and penalties", True))
        }
        gpu, batch = run.machine.gpu, step_batch(num_decodes=20, chunks=[300, 7])
        run.launches(batch)  # the first one fills caches of FlashInfer
        before = gpu.num_torch_calls, gpu.num_host_launches
        launches = run.launches(batch).total()
        mixed = {
            "launches": launches,
            "by the host": gpu.num_host_launches - before[1],
            "calls of torch": gpu.num_torch_calls - before[0],
        }
        return {**figures, "with prompts": mixed}


def extrapolate(model: Model, folder: Path) -> Figures:
    """The figures of all layers from those of two and of three."""
    two, three = measure(model, folder, 2), measure(model, folder, 3)
    return {
        kind: {
            size: count + (model.num_layers - 2) * (three[kind][size] - count)
            for size, count in counts.items()
        }
        for kind, counts in two.items()
    }


def names() -> list[Any]:
    """The models as parameters of a test."""
    slow = ("Qwen3-30B-A3B", "Qwen3-8B-FP8-rows")
    return [
        pytest.param(
            name, marks=[pytest.mark.soak] if model.is_a_repetition or name in slow else []
        )
        for name, model in MODELS.items()
    ]


@pytest.mark.parametrize("name", names())
def test_a_step_takes_as_many_launches_as_agreed(name: str, tmp_path: Path) -> None:
    golden: dict[str, Figures] = json.loads(GOLDEN.read_text())
    found = extrapolate(MODELS[name], tmp_path)
    more = [
        f"{kind}, {size}: {count}, not {golden[name][kind][size]}"
        for kind, counts in found.items()
        for size, count in counts.items()
        if count > golden[name][kind][size]
    ]
    assert not more, more
    assert found == golden[name], "fewer launches: write launches.json anew"


@pytest.mark.soak
@pytest.mark.parametrize("name", MODELS)
def test_all_layers_take_what_two_and_three_foretell(name: str, tmp_path: Path) -> None:
    golden: dict[str, Figures] = json.loads(GOLDEN.read_text())
    assert measure(MODELS[name], tmp_path, None) == golden[name]


if __name__ == "__main__":
    measured: dict[str, Figures] = json.loads(GOLDEN.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        for name in sys.argv[1:] or MODELS:
            measured[name] = extrapolate(MODELS[name], Path(scratch))
    in_order = {name: measured[name] for name in MODELS}
    GOLDEN.write_text(json.dumps(in_order, indent=1) + "\n")
