"""`uvicorn minisrv.asgi:app`: an application whose lifespan starts, drains and stops the engine.

Options are read from the environment. HTTP is served while the model loads; /ready reports when
it can be used. Run it with one worker: each worker would start an engine of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from minisrv import log
from minisrv.config import ServerConfig
from minisrv.frontend.app import create_app
from minisrv.frontend_manager import FrontendManager


@asynccontextmanager
async def _engine(app: FastAPI) -> AsyncIterator[None]:
    await _manager.launch()
    try:
        yield
    finally:
        await _manager.drain()
        await _manager.aclose()


_config = ServerConfig.from_environment()
log.setup("frontend", _config.log_level, _config.log_format)
_manager = FrontendManager(_config)
app = create_app(_config, _manager.registry, host_is_ours=False, start_drain=_manager.start_drain)
app.router.lifespan_context = _engine
