"""What happens before the others start: a download, and the conversion of a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tests.support.hub_server import REPOSITORY, serve_hub
from tests.support.server_process import ServerProcess, running


def test_a_server_downloads_its_model_and_serves_it(
    model_dir: Path, socket_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in model_dir.iterdir()}
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with serve_hub(files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with running("--model", REPOSITORY, tmp_dir=socket_dir) as server:
            assert "download 100%" in server.output
            assert sorted(hub.fetched) == sorted(files)
            body = {"model": REPOSITORY, "prompt": "x", "max_tokens": 3}
            assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
            server.popen.terminate()
            assert server.wait() == 0
            server.assert_nothing_is_left()


def test_a_model_that_the_hub_has_not_is_one_sentence_and_status_2(
    socket_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with serve_hub({}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        server = ServerProcess("--model", "org/none", tmp_dir=socket_dir)
        assert server.wait() == 2
        assert server.lines[-1].startswith("minisrv: --model org/none: ")
        assert "Traceback" not in server.output
        server.assert_nothing_is_left()


def test_a_model_without_tokenizer_json_is_converted_and_served(
    model_dir: Path, socket_dir: Path, tmp_path: Path
) -> None:
    vocab = json.loads((model_dir / "tokenizer.json").read_text())["model"]["vocab"]
    files = {
        "config.json": json.loads((model_dir / "config.json").read_text()),
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<|end|>"},
        "vocab.json": {**vocab, "<|end|>": len(vocab)},
    }
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with running("--model", str(tmp_path), tmp_dir=socket_dir) as server:
        body = {"prompt": "four", "max_tokens": 3, "ignore_eos": True}
        reply = httpx.post(f"{server.url}/v1/completions", json=body)
        assert reply.json()["usage"]["prompt_tokens"] == 4
        assert not (tmp_path / "tokenizer.json").exists()
