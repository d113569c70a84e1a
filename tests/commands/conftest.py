"""Fixtures of this folder."""

from collections.abc import Iterator

import pytest

from tests.support.model_dir import model_dir
from tests.support.server_process import ServerProcess, running

__all__ = ["model_dir"]


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real server with the demo model, which refuses fields that it does not know."""
    arguments = ["--model", "demo", "--dtype", "float32", "--num-threads", "1", "--strict-params"]
    arguments += ["--kv-memory", "64MiB"]
    tmp_dir = tmp_path_factory.mktemp("s") / "t"
    with running(*arguments, tmp_dir=tmp_dir, hash_engine=False) as server:
        yield server
