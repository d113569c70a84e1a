"""Offline, the engine runs without the packages that only grammars and other processes need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.checkpoints import make_checkpoint

ROOT = Path(__file__).parent.parent
PACKAGES = ("zmq", "llguidance", "fastapi", "uvicorn", "gguf")
_WITHOUT = f"import sys; sys.modules |= dict.fromkeys({PACKAGES})\n"


def run_without(code: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / folder) for folder in ("python", "benchmark", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT + code],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_the_throughput_benchmark_runs(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "tiny", "qwen3")
    arguments = ["offline_throughput.py", "--models", str(model), "--requests", "4"]
    arguments += ["--scale", "0.05", "--device", "cpu", "--threads", "1", "--no-peer"]
    code = f"sys.argv = {arguments}\nimport offline_throughput\n"
    # To measure the machine takes longer than to run the benchmark.
    code += "offline_throughput.measure_rates = lambda device: offline_throughput.Rates(1e9, 1e9)\n"
    code += "offline_throughput.main()"
    done = run_without(code)
    assert done.returncode == 0, done.stderr
    assert "| tiny |" in done.stdout


def test_text_is_generated_and_a_grammar_is_refused_with_the_reason() -> None:
    done = run_without(
        "from minisrv import LLM, Grammar\n"
        "with LLM('demo', num_threads=1, kv_memory='64MiB') as llm:\n"
        "    assert llm.generate('Count', max_tokens=3, use_tqdm=False)[0]\n"
        "    llm.generate('Count', grammar=Grammar.regex('[0-9]+'), use_tqdm=False)\n"
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "InvalidRequestError: prompt 0: grammar is not supported with this model" in last
    assert "llguidance cannot be imported" in last
