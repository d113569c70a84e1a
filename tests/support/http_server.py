"""The application on a free port, in a thread, with a scripted back end behind it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import uvicorn
from fastapi import FastAPI
from openai import OpenAI

from minisrv.config import ServerConfig
from minisrv.frontend.app import create_app
from minisrv.frontend.http.protocol import HttpProtocol
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.sampling_params import SamplingParams
from tests.support.scripted_backend import ScriptedBackend

T = TypeVar("T")

MODEL = ModelInfo(
    name="org/tiny",
    created=1_790_000_000,
    max_model_len=2048,
    vocab_size=1000,
    defaults=SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
)


@dataclass
class HttpServer:
    url: str
    registry: RequestRegistry
    backend: ScriptedBackend
    http: httpx.Client
    openai: OpenAI
    loop: asyncio.AbstractEventLoop
    app: FastAPI

    def in_loop(self, function: Callable[[], T]) -> T:
        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(60)

    def chat(self, content: str = "hi", **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return self.http.post("/v1/chat/completions", json={"messages": messages, **fields})

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not self.in_loop(condition):
            assert time.monotonic() < deadline, "the condition did not come true"
            time.sleep(0.005)


@contextlib.contextmanager
def serve(
    ready: bool = True,
    make_backend: Callable[[RequestRegistry], Any] = ScriptedBackend,
    **options: Any,
) -> Iterator[HttpServer]:
    """Run the app with uvicorn; at the end, nothing may be open any more.

    A backend may have an `info` of its model.
    """
    config = ServerConfig(served_model_name=MODEL.name, **options)
    registry = RequestRegistry(config)
    backend = make_backend(registry)
    if ready:
        registry.set_ready(getattr(backend, "info", MODEL))
    # Tests that call every route share a server.
    app = create_app(config, registry, start_drain=lambda: None)
    uvicorn_config = uvicorn.Config(
        app,
        http=HttpProtocol,
        port=0,
        log_config=None,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(uvicorn_config)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(server.serve(),), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    url = f"http://{host}:{port}"
    try:
        with (
            httpx.Client(base_url=url, timeout=60) as http,
            OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as openai,
        ):
            running = HttpServer(url, registry, backend, http, openai, loop, app)
            yield running
            running.wait_until(lambda: registry.num_open == 0)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        loop.close()
