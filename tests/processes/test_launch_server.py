"""The commands: help, errors in options, and what is printed."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest

import minisrv
from minisrv.checkpoint.chat_format import ChatFormat, find_chat_format
from minisrv.config import ServerConfig
from minisrv.console import banner
from minisrv.errors import MinisrvError
from minisrv.launch_server import listen
from minisrv.supervision.run_dir import home_variables
from minisrv.supervision.supervisor import Supervisor
from tests.support.server_process import (
    WITH_HASH_ENGINE,
    ServerProcess,
    environment,
    free_port,
    running,
    status_of,
    wait_until,
)

SERVE = [sys.executable, "-m", "minisrv.launch_server"]


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, timeout=120
    )


def test_help_names_every_option_and_is_fast() -> None:
    done = run(*SERVE, "--help")
    assert done.returncode == 0
    for option in ("--model", "--max-seq-len", "--no-radix-cache", "--start-timeout-s"):
        assert option in done.stdout
    # 0.17 s against 0.07 s.
    assert processor_time(*SERVE, "--help") < 6 * processor_time(sys.executable, "-c", STANDARD)


STANDARD = "import argparse, dataclasses, json, logging, subprocess"


def processor_time(*command: str) -> float:
    """The least of three runs, in seconds; the wall clock would measure what else runs here."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(*command)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


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


def test_minisrv_prints_its_version_and_its_commands() -> None:
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
        pytest.param(
            ["--device", "cpu", "--attention-backend", "flashinfer"],
            "flashinfer requires a GPU",
            marks=pytest.mark.soak,
        ),
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


@pytest.mark.timed
def test_a_taken_port_is_reported_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        started = time.monotonic()
        done = run(*SERVE, "--port", port, "--model", "/no/such/model")
    assert done.returncode == 1
    assert time.monotonic() - started < 2
    (line,) = done.stderr.splitlines()
    assert f"cannot listen on 127.0.0.1 port {port}" in line
    assert "--port" in line


def test_an_unknown_host_name_is_reported() -> None:
    done = run(*SERVE, "--port", "0", "--host", "no.such.host.invalid")
    assert done.returncode == 1
    assert "cannot listen on no.such.host.invalid" in done.stderr


def test_it_listens_on_ipv6_too() -> None:
    (listener,) = listen("::1", 0)
    with listener:
        assert listener.family == socket.AF_INET6


@pytest.mark.parametrize("host", ["::", "localhost"])
def test_both_families_are_served_where_the_host_means_both(host: str) -> None:
    listeners = listen(host, 0)
    try:
        port = listeners[0].getsockname()[1]
        for address in ("127.0.0.1", "::1"):
            socket.create_connection((address, port), timeout=60).close()
    finally:
        for listener in listeners:
            listener.close()


@pytest.mark.parametrize(
    "closed",
    [*(pytest.param(c, marks=pytest.mark.soak) for c in ("0<&-", "1>&-")), "0<&- 1>&- 2>&-"],
)
def test_it_starts_with_standard_streams_closed(
    closed: str, model_dir: Path, socket_dir: Path
) -> None:
    port = free_port()
    socket_dir.mkdir()
    command = f"exec {sys.executable} -c '{WITH_HASH_ENGINE}' --model {model_dir} --port {port}"
    process = subprocess.Popen(
        ["sh", "-c", f"{command} {closed}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(TMPDIR=str(socket_dir)),
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: status_of(f"{url}/ready") == 200 or process.poll() is not None)
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}).status_code == 200
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_a_model_path_that_is_not_utf_8_gets_a_name_that_is(
    model_dir: Path, socket_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9-\xc3\xa9")
    path.symlink_to(model_dir)
    with running("--model", str(path), tmp_dir=socket_dir) as server:
        (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert model["id"] == f"{tmp_path}/caf\\xe9-\u00e9"
        body = {"prompt": "x", "model": model["id"]}
        reply = httpx.post(f"{server.url}/v1/completions", json=body)
        assert reply.json()["model"] == model["id"]
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        assert httpx.get(f"{server.url}/server_info").status_code == 200


@pytest.mark.parametrize("utf8_mode", ["0", pytest.param("1", marks=pytest.mark.soak)])
def test_a_model_path_is_served_by_its_name_under_a_c_locale(
    model_dir: Path,
    socket_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    utf8_mode: str,
) -> None:
    path = tmp_path / "caf\u00e9"
    path.symlink_to(model_dir)
    for name in ("LANG", "LC_CTYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONCOERCECLOCALE", "0")
    monkeypatch.setenv("PYTHONUTF8", utf8_mode)
    with running("--model", str(path), tmp_dir=socket_dir) as server:
        (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert model["id"] == str(path)
        body = {"prompt": "x", "model": model["id"]}
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        assert httpx.get(f"{server.url}/server_info").status_code == 200


def test_model_files_that_libraries_cannot_open_by_name_stop_the_start(
    model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(model_dir, path)
    done = run(*SERVE, "--port", "0", "--model", str(path))
    assert done.returncode == 2
    assert "cannot be loaded" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_without_a_place_for_temporary_files_the_start_says_so(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(MinisrvError, match="set TMPDIR"):
        Supervisor(ServerConfig(model=str(model_dir)))


def test_a_user_without_a_passwd_entry_has_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    assert home_variables() == {}
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.delenv("USER", raising=False)
    assert home_variables() == {"USER": "54321"}
    monkeypatch.delenv("HOME")
    assert home_variables() == {"HOME": tempfile.gettempdir(), "USER": "54321"}


def test_all_log_lines_have_the_form_of_the_option(model_dir: Path, socket_dir: Path) -> None:
    """Those of the HTTP server too."""
    arguments = ("--model", str(model_dir), "--log-format", "json")
    with running(*arguments, tmp_dir=socket_dir) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"no http\r\n\r\n")
            connection.recv(1000)
        wait_until(lambda: "Invalid HTTP request" in server.output)
        (line,) = [line for line in server.lines if "Invalid HTTP request" in line]
        assert json.loads(line)["process"] == "frontend"


def test_http_answers_while_the_model_is_loaded(
    model_dir: Path, socket_dir: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    server = ServerProcess("--model", str(model_dir), tmp_dir=socket_dir, gate=gate)
    try:
        url = server.url
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
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
        "sampling_source": "generation_config.json",
        "unapplied_defaults": ["typical_p=0.9"],
        "notes": ["a note"],
        "chat_format": asdict(ChatFormat()),
    }
    text = banner(ServerConfig(), "http://x", facts, 1.0)
    assert "sampling  top_k 20 (generation_config.json)" in text
    assert "not used  typical_p=0.9" in text
    assert "note      a note" in text
    assert "tools " not in text
    facts["chat_format"] = asdict(find_chat_format({"default": "{{ messages }}"}))
    text = banner(ServerConfig(), "http://x", facts, 1.0)
    assert "tools     described in a system turn: the chat template takes none" in text


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
