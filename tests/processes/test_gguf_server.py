"""A GGUF file served by all real processes, offline, planned, and named in a batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from minisrv.commands import batch
from minisrv.config import ServerConfig
from minisrv.llm import LLM
from tests.support.checkpoints import make_checkpoint
from tests.support.gguf_files import Kind, write_gguf
from tests.support.server_process import environment, running

OPTIONS = {"num_pages": 140, "num_threads": 1, "kernels": "torch"}
FLAGS = ("--num-pages", "140", "--num-threads", "1", "--kernels", "torch")
MESSAGES = [{"role": "user", "content": "tell me something about pages"}]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "llama")


@pytest.fixture(scope="module")
def file(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    hints = {"general.sampling.temp": 0.0, "general.sampling.mirostat": 1}
    return write_gguf(original, tmp_path_factory.mktemp("gguf") / "tiny.gguf", metadata=hints)


def test_a_chat_is_that_of_the_original(original: Path, file: Path, socket_dir: Path) -> None:
    with LLM(original, **OPTIONS) as llm:  # type: ignore[arg-type]
        (expected,) = llm.chat(MESSAGES, max_tokens=40, temperature=0.0)
    with LLM(file, **OPTIONS) as llm:  # type: ignore[arg-type]
        assert llm.chat(MESSAGES, max_tokens=40) == [expected]
    with running("--model", str(file), *FLAGS, tmp_dir=socket_dir, hash_engine=False) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == [str(file)]
        answer = client.chat.completions.create(
            model=str(file), messages=MESSAGES, max_tokens=40  # type: ignore[arg-type]
        )  # fmt: skip
        assert answer.choices[0].message.content == expected
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        body = {"prompt": "x", "max_tokens": 60, "structured_outputs": {"json": schema}}
        constrained = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
        assert constrained.status_code == 200
        assert constrained.json()["choices"][0]["text"].lstrip().startswith("{")
        assert "load weights 100%" in server.output
        assert "float32 on cpu" in server.output
        assert "sampling  temperature 0.0 (tiny.gguf)" in server.output
        assert "not used  mirostat=1" in server.output


def test_a_bad_file_stops_the_start_in_one_sentence(file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(file.read_bytes()[:-100])
    command = [sys.executable, "-m", "minisrv", "serve", str(bad), "--port", "0"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"minisrv: {bad} is not a usable GGUF file: ")


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
def test_a_plan_counts_the_file_and_what_it_is_dequantized_to(
    kind: Kind, original: Path, tmp_path: Path
) -> None:
    path = write_gguf(original, tmp_path / "model.gguf", kind)
    command = [sys.executable, "-m", "minisrv", "plan", str(path), "--gpu", "L4"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ("KiB in the file (Q8_0), dequantized on a GPU" in done.stdout) == (kind is Kind.Q8_0)
    dtype = "float32" if kind is Kind.F32 else "bfloat16"
    assert f"LlamaForCausalLM in {dtype} on L4" in done.stdout


def test_the_contents_of_the_file_are_a_setting_of_a_batch(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(file.read_bytes())
    config = ServerConfig(model=str(copy))
    before = batch.settings_digest(config, {})
    with copy.open("r+b") as changed:
        changed.seek(-1, 2)
        changed.write(b"\1")
    assert batch.settings_digest(config, {}) != before
