from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.server_process import write_model_dir


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("models") / "bytes")


@pytest.fixture
def socket_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short, for socket paths must be."""
    return tmp_path_factory.mktemp("s") / "t"
