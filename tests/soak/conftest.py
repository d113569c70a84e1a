from __future__ import annotations

from tests.processes.conftest import model_dir, socket_dir

__all__ = ["model_dir", "socket_dir"]
