"""`minisrv launch`: what it prints and starts. tests/clients runs the clients themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minisrv.commands import cli
from tests.support.http_server import MODEL, HttpServer, serve
from tests.support.server_process import environment

CONTEXT = MODEL.max_model_len
# Stands in for each client: it writes what it was given.
FAKE = """#!{python}
import json, os, sys
json.dump([sys.argv, dict(os.environ)], sys.stdout)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with serve(api_key=("secret",)) as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("client", "program", "expected"),
    [
        ("codex", "codex", ["-c", 'model="org/tiny"', f"model_context_window={CONTEXT}", "/v1"]),
        ("opencode", "opencode", ["minisrv/org/tiny", f'"output": {CONTEXT // 4}', "/v1"]),
        ("qwen-code", "qwen", [f"QWEN_CODE_MAX_OUTPUT_TOKENS={CONTEXT // 4}", "/v1"]),
        ("claude", "claude", [f"CLAUDE_CODE_MAX_OUTPUT_TOKENS={CONTEXT // 4}", "org/tiny"]),
    ],
)
def test_the_printed_line_starts_the_client_as_run_does(
    server: HttpServer,
    client: str,
    program: str,
    expected: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = tmp_path / "bin" / program
    fake.parent.mkdir()
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    variables = environment(PATH=f"{fake.parent}:{os.environ['PATH']}")
    options = [client, "--url", f"{server.url}/v1", "--api-key", "secret"]

    assert cli.main(["launch", *options, "--", "a question", "--run"]) == 0
    shown = capsys.readouterr()
    run = [sys.executable, "-m", "minisrv", "launch", "--run", *options]
    results = []
    for started in (["sh", "-c", shown.out], [*run, "--", "a question", "--run"]):
        done = subprocess.run(started, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        argv, environ = json.loads(done.stdout)
        results.append((argv[1:], {k: v for k, v in environ.items() if k not in ("_", "SHLVL")}))
    assert results[0] == results[1]
    assert results[0][0][-2:] == ["a question", "--run"]
    assert server.url in shown.out
    assert "secret" in shown.out
    assert all(part in shown.out for part in expected), shown.out
    assert f"context {CONTEXT} tokens" in shown.err
    assert "short for a coding agent" in shown.err


def test_a_client_that_is_not_installed_is_named_with_its_package(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("MINISRV_API_KEY", "secret")
    assert cli.main(["launch", "codex", "--run", "--url", server.url]) == 1
    assert "npm install -g @openai/codex" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--api-key", "wrong"], 1, "needs a key"),
        (["--api-key", "secret", "--model", "other"], 2, "serves org/tiny"),
        (["--url", "http://127.0.0.1:9"], 1, "minisrv serve MODEL"),
        (["--url", "nonsense"], 2, "is not the URL of a server"),
    ],
)
def test_what_is_wrong_is_said(
    server: HttpServer,
    options: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["launch", "opencode", "--url", server.url, *options]) == status
    assert message in capsys.readouterr().err


def test_a_server_that_loads_is_waited_for_by_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    with serve(ready=False) as server:
        assert cli.main(["launch", "claude", "--url", server.url]) == 1
    assert "/ready reports its progress" in capsys.readouterr().err
