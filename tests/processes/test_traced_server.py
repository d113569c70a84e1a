"""The times of spans, in a whole server; and what the option needs and costs without it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server_process import environment, running

NO_SDK = "import sys; sys.modules['opentelemetry.sdk'] = None\n"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60
    )


def seconds(span: Any) -> float:
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def test_spans_have_the_times_of_the_reply_and_the_last_are_sent_at_the_end(
    model_dir: Path, socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opentelemetry.sdk.trace", reason="the extra otlp is not installed")
    from tests.support.collector import collector

    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")  # ms
    before_ns = time.time_ns()
    with collector() as collected:
        arguments = ("--model", str(model_dir), "--otlp-endpoint", collected.url)
        with running(*arguments, tmp_dir=socket_dir, step_s=0.02) as server:
            body = {"prompt": "x" * 200, "max_tokens": 20, "timings": True}
            reply = httpx.post(f"{server.url}/v1/completions", json=body)
            timings = reply.json()["timings"]
            assert not collected.requests
            server.popen.send_signal(signal.SIGTERM)
            assert server.wait() == 0
    (whole,) = collected.wait_for(f"text_completion {model_dir}")
    phases = collected.children(whole)
    for name in ("queue", "prefill", "decode"):
        assert seconds(phases[name]) * 1000 == pytest.approx(timings[f"{name}_ms"], abs=0.01)
    assert seconds(phases["prefill"]) > 0.06  # 200 tokens in steps of 64
    assert seconds(phases["decode"]) > 0.3
    edges = [whole.start_time_unix_nano]
    for name in ("queue", "prefill", "decode"):
        edges += [phases[name].start_time_unix_nano, phases[name].end_time_unix_nano]
    edges += [whole.end_time_unix_nano]
    assert edges == sorted(edges)
    assert before_ns < edges[0]
    assert edges[-1] < time.time_ns()
    trace_id = whole.trace_id.hex()
    assert re.search(rf"POST /v1/completions .* trace={trace_id}$", server.output, re.MULTILINE)


def test_without_the_packages_the_option_is_refused_in_a_sentence() -> None:
    done = run(
        NO_SDK + "from minisrv.config import ServerConfig\n"
        "from minisrv.frontend.app import create_app\n"
        "from minisrv.frontend.registry.registry import RequestRegistry\n"
        "config = ServerConfig(otlp_endpoint='http://127.0.0.1:1')\n"
        "create_app(config, RequestRegistry(config))"
    )
    last = done.stderr.splitlines()[-1]
    assert "ConfigError: --otlp-endpoint needs the packages of the extra otlp: " in last
    assert "pip install 'minisrv[otlp]'" in last


def test_without_the_option_nothing_of_opentelemetry_is_imported() -> None:
    done = run(
        "import sys\n"
        "from minisrv.config import ServerConfig\n"
        "from minisrv.frontend import process\n"
        "from minisrv.frontend.app import create_app\n"
        "from minisrv.frontend.registry.registry import RequestRegistry\n"
        "create_app(ServerConfig(), RequestRegistry(ServerConfig()))\n"
        "sys.exit(','.join(name for name in sys.modules if 'opentelemetry' in name) or 0)"
    )
    assert done.returncode == 0, done.stderr
