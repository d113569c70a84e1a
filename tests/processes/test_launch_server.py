"""The commands: help, errors in options, and what is printed."""

from __future__ import annotations

import re
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

import minisrv
from minisrv.config import ServerConfig
from minisrv.launch_server import banner, listen
from tests.support.server_process import ServerProcess, environment, running, wait_until

SERVE = [sys.executable, "-m", "minisrv.launch_server"]


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, timeout=120
    )


def test_help_names_every_option_and_is_fast() -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run(*SERVE, "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: the wall clock would measure what else the machine does.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == 0
    for option in ("--model", "--max-seq-len", "--no-radix-cache", "--start-timeout-s"):
        assert option in done.stdout
    assert min(seconds) < 0.5


def test_help_loads_no_heavy_package() -> None:
    code = (
        "import sys; from minisrv import launch_server\n"
        "try: launch_server.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(','.join({'zmq', 'numpy', 'fastapi', 'msgpack', 'torch'} & sys.modules.keys()))"
    )
    assert run(sys.executable, "-c", code).stderr == "\n"


def test_minisrv_serve_is_the_same_command() -> None:
    serve = run(sys.executable, "-m", "minisrv", "serve", "--help").stdout
    assert serve.startswith("usage: minisrv serve")
    launch = run(*SERVE, "--help").stdout
    assert serve.split("options:")[1] == launch.split("options:")[1]


def test_minisrv_tells_its_version_and_its_commands() -> None:
    assert (
        run(sys.executable, "-m", "minisrv", "--version").stdout
        == f"minisrv {minisrv.__version__}\n"
    )
    for arguments, status in ((("--help",), 0), ((), 2), (("sing",), 2)):
        done = run(sys.executable, "-m", "minisrv", *arguments)
        assert done.returncode == status
        assert "minisrv serve MODEL" in done.stdout + done.stderr
    assert "'sing'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--tp", "3"],
            "--tp is 3; the model's 4 attention heads cannot be split into 3 equal parts",
        ),
        (["--device", "cpu", "--attention-backend", "flashinfer"], "flashinfer requires a GPU"),
        (["--page-size", "3"], "--page-size is 3; it must be a power of two"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
        (["--model", "/no/such/model"], "/no/such/model: no such directory"),
        (["--modle", "x"], "unrecognized arguments: --modle"),
        (["one", "--model", "two"], "two models are given: one and two"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(arguments: list[str], sentence: str) -> None:
    done = run(*SERVE, "--port", "0", *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_wrong_variable_is_one_sentence_and_status_2() -> None:
    done = run(*SERVE, MINISRV_PORT="eighty")
    assert done.returncode == 2
    assert "MINISRV_PORT is 'eighty'; it must be an integer" in done.stderr


def test_a_model_that_cannot_be_loaded_is_one_sentence_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    done = run(*SERVE, "--port", "0", "--model", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("minisrv: ")
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_told_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        started = time.monotonic()
        done = run(*SERVE, "--port", port, "--model", "/no/such/model")
    assert done.returncode == 1
    assert time.monotonic() - started < 2
    (line,) = done.stderr.splitlines()
    assert f"cannot listen on 127.0.0.1 port {port}" in line
    assert "--port" in line


def test_a_host_name_that_nobody_knows_is_told() -> None:
    done = run(*SERVE, "--port", "0", "--host", "no.such.host.invalid")
    assert done.returncode == 1
    assert "cannot listen on no.such.host.invalid" in done.stderr


def test_it_listens_on_ipv6_too() -> None:
    with listen("::1", 0) as listener:
        assert listener.family == socket.AF_INET6


def test_http_answers_while_the_model_is_loaded(
    model_dir: Path, socket_dir: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    server = ServerProcess("--model", str(model_dir), tmp_dir=socket_dir, gate=gate)
    try:
        url = server.url
        assert httpx.get(f"{url}/health", timeout=10).status_code == 200
        wait_until(lambda: httpx.get(f"{url}/ready").json().get("phase") == "weights")
        loading = httpx.get(f"{url}/ready")
        assert loading.status_code == 503
        assert loading.json() == {"status": "loading", "phase": "weights", "progress": 0.5}
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_starting"
        gate.touch()
        server.wait_until_ready()
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}).status_code == 200
    finally:
        server.end()


def test_the_start_prints_progress_and_a_banner(model_dir: Path, socket_dir: Path) -> None:
    arguments = ("--model", str(model_dir), "--served-model-name", "bytes")
    with running(*arguments, tmp_dir=socket_dir) as server:
        wait_until(lambda: "sampling" in server.output)
        assert re.search(r"^ +\d+\.\d s  weights 100%$", server.output, re.MULTILINE)
        assert f"URL       {server.url}/v1\n" in server.output
        assert "model     bytes, hashes on cpu" in server.output
        assert "sampling  temperature 0.0 (generation_config.json)" in server.output
        served = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
        assert served == "bytes"


def test_the_banner_names_what_the_generation_config_asks_in_vain() -> None:
    facts = {
        "max_seq_len": 100,
        "placement": "float32 on cpu",
        "memory_plan": "weights 1 MiB",
        "sampling_defaults": {"temperature": None, "top_k": 20},
        "unapplied_defaults": ["typical_p=0.9"],
        "notes": ["a note"],
    }
    text = banner(ServerConfig(), "http://x", facts, 1.0)
    assert "sampling  top_k 20 (generation_config.json)" in text
    assert "not used  typical_p=0.9" in text
    assert "note      a note" in text


def test_importing_the_package_loads_nothing_and_its_names_are_lazy() -> None:
    code = (
        "import sys; before = set(sys.modules); import minisrv; "
        "loaded = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "assert not loaded & {'torch', 'numpy', 'zmq', 'fastapi', 'msgpack'}, loaded; "
        "minisrv.SamplingParams(temperature=0.5); minisrv.ServerConfig(); "
        "assert 'numpy' not in sys.modules"
    )
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        minisrv.Llm  # noqa: B018
