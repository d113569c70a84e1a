"""The script for a machine with a GPU, on one without: it says so, and the rest of it holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python"), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU: run the script itself")
def test_every_stage_is_in_the_table_with_its_result(tmp_path: Path) -> None:
    stages = ["device", "kernels", "checkpoints"]
    done = run(["scripts/gpu_check.sh", *stages], PYTHON=sys.executable, OUT=str(tmp_path))
    assert done.returncode == 1, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == stages
    assert [row[1] for row in rows] == ["failed (1)", "skipped", "skipped"]
    assert "torch finds no GPU" in rows[0][3]
    assert "skipped" in rows[1][3]
    (page,) = tmp_path.glob("gpu_check_*.md")
    assert page.read_text() == done.stdout


def test_a_stage_that_is_none_is_refused(tmp_path: Path) -> None:
    for stage in ("everything", "bench-GPT-9"):
        done = run(["scripts/gpu_check.sh", stage], PYTHON=sys.executable, OUT=str(tmp_path))
        assert done.returncode == 2
        assert f"there is no stage {stage}" in done.stderr


def test_a_stage_is_cut_off_when_the_time_is_over(tmp_path: Path) -> None:
    done = run(
        ["scripts/gpu_check.sh", "host", "kernels"],
        PYTHON=sys.executable,
        OUT=str(tmp_path),
        BUDGET_S="1",
    )
    assert done.returncode == 1
    assert "| host | cut off |" in done.stdout
    assert "| kernels | no time left |" in done.stdout


def test_the_modules_that_are_built_are_those_that_the_backend_loads(tmp_path: Path) -> None:
    pytest.importorskip("flashinfer")
    done = run(
        [sys.executable, "scripts/build_flashinfer.py", "--list", "--head-dims", "128"],
        FLASHINFER_WORKSPACE_BASE=str(tmp_path),
        FLASHINFER_CUDA_ARCH_LIST="9.0a",
    )
    assert done.returncode == 0, done.stderr
    norm, silu, attention = done.stdout.splitlines()
    assert (norm, silu) == ("norm", "silu_and_mul")
    assert attention.startswith("batch_prefill_with_kv_cache_dtype_q_bf16_dtype_kv_bf16")
    assert "head_dim_qk_128_head_dim_vo_128_posenc_0_use_swa_False" in attention
