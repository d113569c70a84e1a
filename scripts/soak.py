"""Run the parts of the soak: what takes too long to be tried at every change.

Run: python scripts/soak.py [PART ...]; without a part all of them, one after another. Exits with
status 1 if one fails or takes longer than half an hour.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT_S = 30 * 60

# Tests marked `soak` by part. These talk to real servers, and some print figures.
SERVER_TESTS = {
    "crowd": ["tests/soak/test_crowd.py"],
    "fuzz": ["tests/soak/test_fuzz.py"],
    "drain": ["tests/soak/test_drain.py"],
    "day": ["tests/soak/test_day.py"],
    "kills": ["tests/soak/test_kills.py"],
    "dashboard": ["tests/soak/test_dashboard.py"],
    "processes": ["tests/processes"],
    "ray": ["tests/ray"],
    "simulate": ["tests/soak/test_simulate.py"],
}
TESTS = {
    "parity": [
        *("tests/exactness/test_transformers_parity.py", "tests/exactness/test_device_runner.py"),
        *("tests/exactness/test_tensor_parallel.py", "tests/exactness/test_gguf.py"),
        *("tests/exactness/test_quantized.py", "tests/exactness/test_fp8_cache_served.py"),
    ],
    "cache": ["tests/scheduler/test_never_corrupt.py", "tests/scheduler/test_fair_shares.py"],
    "kv_events": ["tests/kv_events"],
    "sampling": [
        *("tests/exactness/test_sampled_texts.py", "tests/exactness/test_seeds.py"),
        *("tests/exactness/test_device_runner_seeds.py", "tests/exactness/test_logprobs.py"),
    ],
    "grammars": ["tests/exactness/test_grammar_draws.py", "tests/structured_output"],
    "streams": ["tests/frontend", "tests/e2e", "tests/browser"],
    "real": ["tests/real"],
    "commands": ["tests/commands"],
    "gpu_dry_run": [
        *("tests/gpu_dry_run/test_serving.py", "tests/gpu_dry_run/test_ranks.py"),
        "tests/gpu_dry_run/test_planner.py",
    ],
    "gpu_kernels": ["tests/gpu_dry_run/test_kernels.py", "tests/gpu_dry_run/test_launches.py"],
    "gpu_stand_ins": [
        *("tests/engine/test_triton_kernels.py", "tests/engine/test_step_buffer.py"),
        *("tests/engine/test_flashinfer.py", "tests/gpu", "tests/test_gpu_check.py"),
    ],
    "cpu_kernels": ["tests/engine/test_kernels.py"],
    "benchmark": ["tests/benchmark", "tests/test_offline_throughput.py"],
}
# The first two put faults into a copy of the package; the tests must find each.
SCRIPTS = {
    "seeded_bugs": "scripts/seeded_bugs.py",
    "dry_run_faults": "scripts/dry_run_faults.py",
    "clients": "scripts/try_clients.py",
}


def command(part: str) -> list[str]:
    """What runs a part."""
    if part in SCRIPTS:
        return [sys.executable, SCRIPTS[part]]
    options = ["-m", "soak", "--timeout", str(LIMIT_S)]
    options += ["-s"] if part in SERVER_TESTS else ["-n", "2"]
    return [sys.executable, "-m", "pytest", *options, *(SERVER_TESTS | TESTS)[part]]


def run(part: str) -> bool:
    """Whether a part passes in time."""
    print(f"== {part}", flush=True)
    started = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if part not in SCRIPTS else None
    running = subprocess.Popen(command(part), cwd=ROOT, env=environment)
    try:
        result = "failed" if running.wait(LIMIT_S) else "passed"
    except subprocess.TimeoutExpired:
        result = "took too long"
        end(running)
    print(f"== {part}: {result}, {time.monotonic() - started:.0f} s", flush=True)
    return result == "passed"


def end(running: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does, so that tests end the servers that they have started."""
    running.send_signal(signal.SIGINT)
    try:
        running.wait(60)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()


def main(parts: list[str]) -> int:
    """Run the named parts, or all; the exit status."""
    known = [*SERVER_TESTS, *TESTS, *SCRIPTS]
    if unknown := [part for part in parts if part not in known]:
        print(f"no part is called {', '.join(unknown)}; there are {', '.join(known)}")
        return 2
    passed = [run(part) for part in parts or known]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
