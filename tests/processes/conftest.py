from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.server_process import write_model_dir


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("models") / "bytes")


@pytest.fixture
def socket_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short, for socket paths must be."""
    return tmp_path_factory.mktemp("s") / "t"


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A hash scheduler given it starts, until it is removed."""
    path = tmp_path / "gate"
    path.touch()
    return path


@pytest.fixture
def new_children() -> Callable[[], list[psutil.Process]]:
    """Returns the processes that the test has started and that still run."""
    before = set(psutil.Process().children())
    return lambda: [child for child in psutil.Process().children() if child not in before]
