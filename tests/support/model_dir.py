"""One small checkpoint for a whole run, as a fixture."""

from pathlib import Path

import pytest

from tests.support.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen3")
