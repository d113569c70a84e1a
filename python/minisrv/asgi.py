"""`uvicorn minisrv.asgi:app`: an application whose lifespan starts, drains and stops the engine.

Options are read from the environment. HTTP is served while the model loads; /ready reports when
it can be used. Run it with one worker: there is one engine, and further workers only stand by.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from fastapi import FastAPI

from minisrv import log
from minisrv.config import ServerConfig
from minisrv.frontend.app import close_app, create_app
from minisrv.frontend_manager import FrontendManager
from minisrv.supervision.sole_worker import SoleWorker, workers_parent

logger = logging.getLogger("minisrv.asgi")


@asynccontextmanager
async def _engine(app: FastAPI) -> AsyncIterator[None]:
    logging.getLogger("uvicorn.access").disabled = True  # minisrv logs each request
    with ExitStack() as stack:
        if (parent_pid := workers_parent()) is not None:
            place = SoleWorker(parent_pid)
            stack.callback(place.leave)
            if not place.take():
                logger.warning(
                    "another worker runs the engine, and this one stands by: more than one worker "
                    "is of no use"
                )
                if not await place.wait():
                    yield
                    return
        await _manager.launch()
        try:
            yield
        finally:
            await _manager.drain()
            await _manager.aclose()
            close_app(app)


_config = ServerConfig.from_environment()
log.setup("frontend", _config.log_level, _config.log_format)
_manager = FrontendManager(_config)
app = create_app(_config, _manager.registry, host_is_ours=False, start_drain=_manager.start_drain)
app.router.lifespan_context = _engine
