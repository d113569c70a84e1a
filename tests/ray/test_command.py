"""`minisrv ray CONFIG` with a real model: one request, then Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.server_process import environment, free_port, status_of, wait_until

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.soak


def test_a_file_is_served_until_ctrl_c(tmp_path: Path) -> None:
    config, port = tmp_path / "fleet.yaml", free_port()
    config.write_text(
        f"model: demo\nnum_threads: 1\nkv_memory: 64MiB\nport: {port}\nnum_replicas: 2\n"
        "num_cpus: 0.5\nserved_model_name: [small]\n"
    )
    command = [sys.executable, "-m", "minisrv", "ray", str(config)]
    running = subprocess.Popen(command, env=environment(), start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: status_of(f"{url}/ready") == 200 or running.poll() is not None, 120)
        assert running.poll() is None
        family = psutil.Process(running.pid).children(recursive=True)
        assert sum("ServeReplica:minisrv:minisrv" in " ".join(p.cmdline()) for p in family) == 2
        body = {"model": "small", "messages": [{"role": "user", "content": "Hi"}]}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["message"]["content"]
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 0
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
    finally:
        running.kill()
        running.wait()
