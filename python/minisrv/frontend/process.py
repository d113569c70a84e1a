"""The frontend process: serves HTTP from its start, and follows the supervisor's notices."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import cast

import uvicorn
import uvloop
from fastapi import FastAPI

from minisrv import log
from minisrv.config import ServerConfig
from minisrv.errors import EngineDeadError, NotReadyError
from minisrv.frontend.app import close_app, create_app
from minisrv.frontend.drain import drain
from minisrv.frontend.http.protocol import HttpProtocol, HttpServer
from minisrv.frontend.registry.engine_client import EngineClient
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.supervision.child_main import BEAT_S, Child, end_start, run_child
from minisrv.supervision.records import (
    ChildReady,
    DrainBegun,
    Drained,
    DrainRequested,
    EngineEnded,
    EngineLost,
    EngineReady,
    EngineStalled,
    Notice,
    StartProgress,
)

# At the end, open replies have this long to reach their clients.
LAST_WORDS_S = 2


def take_notice(
    registry: RequestRegistry, client: EngineClient, config: ServerConfig, notice: Notice
) -> None:
    """Change the state of the registry as the supervisor's notice says."""
    match notice:
        case StartProgress(phase, fraction):
            registry.set_progress(phase, fraction)
        case EngineReady(facts, epoch, suspects, restarts):
            model = ModelInfo.from_facts(config, facts)
            registry.restarts = restarts
            client.begin_epoch(epoch)
            registry.set_ready(model)
            registry.resume(model, suspects)
        case EngineLost(sentence):
            registry.hold(sentence)
        case EngineStalled(sentence):
            registry.set_stalled(sentence)
        case EngineEnded(sentence, stopping=True):
            registry.fail_all(NotReadyError(sentence, code="server_draining"))
        case EngineEnded(sentence):
            registry.fail_all(EngineDeadError(sentence))


def main() -> None:
    run_child("frontend", lambda child: uvloop.run(_serve(child)))


async def _serve(child: Child) -> None:
    registry = RequestRegistry(child.config)
    draining: asyncio.Task[None] | None = None

    async def drain_and_report() -> None:
        child.report(DrainBegun())
        server.announce_close()
        await drain(registry, lambda: server.is_idle, child.config.drain_timeout)
        child.report(Drained())

    def start_drain() -> None:
        nonlocal draining
        draining = draining or asyncio.create_task(drain_and_report(), name="drain")

    server = _make_server(child.config, registry, start_drain)
    loop = asyncio.get_running_loop()

    def take(notice: Notice) -> None:
        take_notice(registry, client, child.config, notice)
        if isinstance(notice, EngineReady):
            child.report(ChildReady())
        elif isinstance(notice, DrainRequested):
            start_drain()
        elif isinstance(notice, EngineEnded):
            server.should_exit = True
        elif isinstance(notice, EngineLost) and (line := log.terminal_line()):
            line.erase()  # the supervisor draws now

    failure: Exception | None = None

    def take_or_fail(notice: Notice) -> None:
        """The event loop would only log an error and go on."""
        nonlocal failure
        try:
            take(notice)
        except Exception as error:
            failure = error
            leave()
            registry.fail_all(EngineDeadError(f"a notice cannot be handled: {error}"))

    progress = child.open_progress()

    def beat() -> None:
        progress.beat()
        loop.call_later(BEAT_S, beat)

    beat()
    run_dir, num_tokenizers = Path(child.boot.run_dir), child.config.num_tokenizers

    def leave() -> None:
        server.should_exit = True

    async with EngineClient(run_dir, registry, num_tokenizers, child.boot.epoch, leave) as client:
        child.handle_notices(lambda notice: loop.call_soon_threadsafe(take_or_fail, notice))
        end_start()
        await server.serve([socket.socket(fileno=fd) for fd in child.boot.fds.values()])
        close_app(cast(FastAPI, server.config.app))
        if (error := failure or client.error) is not None:
            raise error


def _make_server(
    config: ServerConfig, registry: RequestRegistry, start_drain: Callable[[], None]
) -> HttpServer:
    return HttpServer(
        uvicorn.Config(
            create_app(config, registry, start_drain=start_drain),
            http=HttpProtocol,
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=LAST_WORDS_S,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
        )
    )
