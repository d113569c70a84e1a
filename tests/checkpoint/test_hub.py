"""Model names: directories, the demo model, and downloads from a hub that runs in the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minisrv.checkpoint import hub as hub_module
from minisrv.checkpoint.hub import find_local_model, resolve_model
from minisrv.errors import ConfigError
from minisrv.start_progress import no_progress
from tests.support.hub_server import COMMIT, GATED, REPOSITORY, Hub, serve_hub

PACKAGES = Path(__file__).parents[2] / "python"
RESOLVE = """
import json, sys
from minisrv.errors import ConfigError
from minisrv.checkpoint.hub import resolve_model
progress = []
try:
    path = resolve_model(sys.argv[1], lambda *step: progress.append(step))
    print(json.dumps({"path": str(path), "progress": progress}))
except ConfigError as error:
    print(json.dumps({"error": error.message}))
"""
FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": bytes(range(256)) * 4096,
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"a pickle",
    "README.md": b"words",
}


@dataclass
class Client:
    """`resolve_model` in a process of its own, for the hub's client reads its settings once."""

    hub: Hub
    home: Path

    def resolve(self, name: str, **variables: str) -> dict[str, Any]:
        env = {
            **os.environ,
            "PYTHONPATH": str(PACKAGES),
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            **variables,
        }
        command = [sys.executable, "-c", RESOLVE, name]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with serve_hub(dict(FILES)) as hub:
        yield Client(hub, tmp_path / "home")


@pytest.mark.parametrize("name", [REPOSITORY, f"{REPOSITORY}@v1", f"{REPOSITORY}@{COMMIT}"])
def test_a_hub_name_is_downloaded_with_progress(name: str, client: Client) -> None:
    result = client.resolve(name)
    path = Path(result["path"])
    assert {p.name for p in path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "chat_template.jinja",
    }
    assert all((path / p.name).read_bytes() == FILES[p.name] for p in path.iterdir())
    phases, fractions, sizes, units = zip(*result["progress"], strict=True)
    assert set(phases) == {"download"}
    assert fractions[-1] == 1.0
    assert sizes[-1] == sum(len(FILES[p.name]) for p in path.iterdir())
    assert set(units) == {"B"}
    assert all(0 <= fraction <= 1 for fraction in fractions)


def test_a_second_start_downloads_nothing_and_needs_no_network(client: Client) -> None:
    first = client.resolve(REPOSITORY)["path"]
    assert len(client.hub.fetched) == 3
    assert client.resolve(REPOSITORY)["path"] == first
    assert client.resolve(REPOSITORY, HF_HUB_OFFLINE="1")["path"] == first
    assert client.resolve(REPOSITORY, HF_ENDPOINT="http://127.0.0.1:9")["path"] == first
    assert len(client.hub.fetched) == 3


def test_a_download_that_breaks_off_goes_on_where_it_stopped(client: Client) -> None:
    client.hub.cut_after = 100_000
    path = Path(client.resolve(REPOSITORY)["path"])
    assert (path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert client.hub.fetched.count("model.safetensors") == 2


@pytest.mark.parametrize(
    ("name", "variables", "reason"),
    [
        ("org/none", {}, "no such model on the hub"),
        (f"{REPOSITORY}@v9", {}, "not this revision"),
        (GATED, {}, "accept its terms"),
        (REPOSITORY, {"HF_HUB_OFFLINE": "1"}, "not in the hub's cache"),
        (REPOSITORY, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
    ],
)
def test_a_miss_is_one_clear_sentence(
    name: str, variables: dict[str, str], reason: str, client: Client
) -> None:
    error = client.resolve(name, **variables)["error"]
    assert error.startswith(f"--model {name}: ")
    assert reason in error
    assert "\n" not in error


def test_a_directory_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    expected = (tmp_path / "models" / "one").resolve()
    for name in ("models/one", "./models/one", str(expected)):
        assert resolve_model(name, no_progress) == expected


def test_demo_is_the_model_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_module, "DEMO_DIR", tmp_path / "demo_model")
    with pytest.raises(ConfigError, match="no demo model"):
        find_local_model("demo")
    (tmp_path / "demo_model").mkdir()
    assert find_local_model("demo") == tmp_path / "demo_model"


@pytest.mark.parametrize("name", ["/no/such", "./no/such", "~/no/such", "a/b/c", "plain", "a b/c"])
def test_what_is_neither_a_directory_nor_a_hub_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        find_local_model(name)


@pytest.mark.parametrize("name", ["model.gguf", "blob"])
def test_a_gguf_file_is_a_model(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF...")
    assert find_local_model(str(tmp_path / name)) == tmp_path / name


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ConfigError, match="is a file, but not GGUF; use a GGUF file or"):
        find_local_model(str(tmp_path / "model.safetensors"))


QUANTIZED = {
    name: f"GGUF {name}".encode()
    for name in (
        "README.md",
        "tiny-q4_k_m.gguf",
        "tiny-q4_k_s.gguf",
        "tiny.Q8_0.gguf",
        "BF16/tiny-BF16-00001-of-00002.gguf",
        "BF16/tiny-BF16-00002-of-00002.gguf",
    )
}


@pytest.mark.parametrize(
    ("quantization", "files"),
    [
        ("Q4_K_M", ["tiny-q4_k_m.gguf"]),
        ("q8_0@v1", ["tiny.Q8_0.gguf"]),
        ("BF16", [name for name in QUANTIZED if name.startswith("BF16")]),
    ],
)
def test_a_quantization_selects_a_file_of_the_hub(
    quantization: str, files: list[str], client: Client
) -> None:
    client.hub.files = QUANTIZED
    result = client.resolve(f"{REPOSITORY}:{quantization}")
    path = Path(result["path"])
    assert path.as_posix().endswith(files[0])
    assert path.read_bytes() == QUANTIZED[files[0]]
    assert sorted(client.hub.fetched) == files
    assert result["progress"][-1][:2] == ["download", 1.0]


def test_a_file_of_the_hub_is_found_in_the_cache_without_a_network(client: Client) -> None:
    client.hub.files = QUANTIZED
    first = client.resolve(f"{REPOSITORY}:Q8_0")
    again = client.resolve(f"{REPOSITORY}:Q8_0", HF_HUB_OFFLINE="1")
    assert again["path"] == first["path"]
    unreachable = client.resolve(f"{REPOSITORY}:Q8_0", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable["path"] == first["path"]


@pytest.mark.parametrize(
    ("name", "files", "reason"),
    [
        (f"{REPOSITORY}:Q5_0", QUANTIZED, "no GGUF file with Q5_0 in its name; the repository has"),
        (f"{REPOSITORY}:Q4_K", QUANTIZED, "no GGUF file with Q4_K in its name; "),
        (
            f"{REPOSITORY}:Q8_0",
            {**QUANTIZED, "large-Q8_0.gguf": b"GGUF"},
            "several GGUF files with Q8_0 in its name; the repository has ",
        ),
        (f"{REPOSITORY}:Q8_0", FILES, "no GGUF file with Q8_0 in its name; the repository has no"),
        (REPOSITORY, QUANTIZED, "add a quantization, as in :Q4_K_M; the repository has "),
        ("org/none:Q8_0", QUANTIZED, "no such model on the hub"),
    ],
)
def test_a_quantization_that_selects_no_file_is_refused_with_the_list(
    name: str, files: dict[str, bytes], reason: str, client: Client
) -> None:
    client.hub.files = files
    error = client.resolve(name)["error"]
    assert error.startswith(f"--model {name}: ")
    assert reason in error


def test_a_plan_downloads_only_the_config(tmp_path: Path) -> None:
    config = PACKAGES.parent / "benchmark" / "models" / "Qwen3-0.6B" / "config.json"
    with serve_hub({**FILES, "config.json": config.read_bytes()}) as hub:
        env = {**os.environ, "PYTHONPATH": str(PACKAGES), "HF_ENDPOINT": hub.url}
        command = [sys.executable, "-m", "minisrv", "plan", REPOSITORY, "--gpu", "H100"]
        done = subprocess.run(
            command, env={**env, "HF_HOME": str(tmp_path)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "596,049,920 parameters" in done.stdout
        assert hub.fetched == ["config.json"]
