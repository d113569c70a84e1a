"""The server without HTTP: a frontend inside the caller's own event loop.

async with FrontendManager(model="demo") as manager:
    uid = manager.new_user()
    await manager.send_one(TokenizeMsg(uid=uid, prompt="Hello", sampling=SamplingParams()))
    async for text in manager.stream_generate(uid):
        print(text, end="")
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass, replace
from typing import Any

from minisrv.config import ServerConfig
from minisrv.errors import EngineDeadError, InvalidRequestError, NotReadyError
from minisrv.frontend.drain import drain
from minisrv.frontend.process import take_notice
from minisrv.frontend.registry.engine_client import EngineClient
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.frontend.registry.states import Serving
from minisrv.supervision.records import FIRST_EPOCH, EngineEnded, EngineReady, Notice
from minisrv.supervision.supervisor import Supervisor
from minisrv.supervision.thread import SupervisorThread
from minisrv.wire.arrays import token_array
from minisrv.wire.events import Event
from minisrv.wire.messages import Start, TokenizeMsg

logger = logging.getLogger("minisrv.frontend_manager")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """The output of one choice since its last ack.

    incremental_output: text; all of a uid's join to its full text. output_tokens: so far.
    finish_reason: stop or length, in the last ack of a uid. stop_reason: the stop string or stop
    token id that ended it. prompt_tokens and cached_tokens are those of the request.
    """

    uid: int
    incremental_output: str
    finished: bool
    finish_reason: str | None
    stop_reason: str | int | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


class FrontendManager:
    """Owns the processes of an engine; belongs to one event loop after `start`."""

    def __init__(self, config: ServerConfig | None = None, **options: Any) -> None:
        """`options` replace a `config`: fields of ServerConfig; the environment sets the others.

        Raises ConfigError.
        """
        if config is not None and options:
            raise TypeError("give a config or options, not both")
        self.config = config or ServerConfig.from_environment(**options)
        self.registry = RequestRegistry(self.config)
        self._supervisor: Supervisor | None = None
        self._thread: SupervisorThread | None = None
        self._client: EngineClient | None = None
        self._started = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None
        self._num_choices: dict[int, int] = {}

    async def start(self) -> None:
        """Start the processes and wait until they serve.

        Raises ConfigError for a model or an option that cannot be used, MinisrvError if a process
        dies.
        """
        await self.launch()
        await self._started.wait()
        if not isinstance(self.registry.state, Serving):
            await self.aclose()
            assert self._thread is not None
            raise self._thread.error or EngineDeadError("the engine was closed during its start")

    async def launch(self) -> None:
        """Start the processes, once; `registry.state` reports their progress."""
        if self._thread is not None:
            return
        loop = asyncio.get_running_loop()

        def hand_over(notice: Notice) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._take, notice)

        self._supervisor = supervisor = Supervisor(self.config, on_notice=hand_over)
        # It binds in the run directory, which a supervisor that fails takes with it.
        num_tokenizers = self.config.num_tokenizers
        self._client = EngineClient(
            supervisor.run_dir, self.registry, num_tokenizers, FIRST_EPOCH, on_error=supervisor.stop
        )
        self._thread = SupervisorThread(supervisor)
        self._thread.start()
        await self._client.__aenter__()

    def _take(self, notice: Notice) -> None:
        if self._client is None or self._supervisor is None:  # closed
            return
        try:
            take_notice(self.registry, self._client, self.config, notice)
        except Exception as error:
            logger.exception("a notice cannot be handled")
            self.registry.fail_all(EngineDeadError(f"a notice cannot be handled: {error}"))
            self._supervisor.stop()
            self._started.set()
        if isinstance(notice, EngineReady | EngineEnded):
            self._started.set()

    async def drain(self) -> None:
        """Refuse new requests and wait until the open ones have ended, up to --drain-timeout."""
        await drain(self.registry, lambda: self.registry.is_idle, self.config.drain_timeout)

    def start_drain(self) -> None:
        """Drain in the background, and then end the processes."""

        async def drain_and_close() -> None:
            await self.drain()
            await self.aclose()

        self._draining = self._draining or asyncio.create_task(drain_and_close(), name="drain")

    async def aclose(self) -> None:
        """End the processes; open requests fail with `server_draining`. Allowed in every state."""
        if self._thread is not None:
            await asyncio.to_thread(self._thread.stop)
        if self._client is not None:
            client, self._client = self._client, None
            await client.__aexit__(None, None, None)

    def close(self) -> None:
        """End the processes, from code outside the event loop."""
        if self._thread is not None:
            self._thread.stop()

    async def __aenter__(self) -> FrontendManager:
        try:
            await self.start()
        except BaseException:  # a cancelled start too leaves nothing behind
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def new_user(self, n: int = 1) -> int:
        """The uid of a request with `n` choices, which have the uids uid, uid + 1, ...

        Each must be sent and read, or aborted. Raises NotReadyError, OverloadedError, and
        RequestFailedError when the engine has died.
        """
        if self._thread is None:
            raise NotReadyError("the engine is not started; await start() first")
        uid = self.registry.open(n)
        self._num_choices[uid] = n
        return uid

    def send_one(self, message: TokenizeMsg) -> Awaitable[None]:
        """Send the request of a uid from `new_user`. It is sent at once, awaited or not.

        What `message.sampling` leaves open is filled from the model's defaults. A prompt of token
        ids may be any sequence of integers.
        """
        num_choices = self._num_choices.pop(message.uid, None)
        if num_choices != message.sampling.n:
            raise InvalidRequestError(
                f"uid {message.uid} with n={message.sampling.n} is not from new_user, or was sent"
            )
        sampling = message.sampling.with_defaults(self.registry.model.defaults)
        prompt = message.prompt
        if prompt is not None and not isinstance(prompt, str):
            prompt = token_array(prompt)
        self.registry.send(replace(message, prompt=prompt, sampling=sampling))
        sent = asyncio.get_running_loop().create_future()
        sent.set_result(None)
        return sent

    async def wait_for_ack(self, uid: int) -> AsyncGenerator[Ack, None]:
        """Acks until each choice of `uid` has finished, or until `abort`; leaving early aborts.

        Raises RequestFailedError for a request that was refused or lost.
        """
        starts: dict[int, Start] = {}
        try:
            async for event in self.registry.events(uid):
                event.raise_failure()
                if event.start is not None:
                    starts[event.uid] = event.start
                if event.uid in starts:  # before it there is only the progress of the prompt
                    yield _ack(event, starts[event.uid])
        finally:
            self.abort(uid)

    async def stream_generate(self, uid: int) -> AsyncGenerator[str, None]:
        """The text of a uid with one choice, piece by piece. Ends and raises as wait_for_ack."""
        async with contextlib.aclosing(self.wait_for_ack(uid)) as acks:
            async for ack in acks:
                if ack.incremental_output:
                    yield ack.incremental_output

    def abort(self, uid: int) -> bool:
        """Stop all choices of `uid` and free what they hold. Returns whether anything still ran."""
        self._num_choices.pop(uid, None)
        return self.registry.abort(uid)


def _ack(event: Event, start: Start) -> Ack:
    return Ack(
        uid=event.uid,
        incremental_output=event.text,
        finished=event.final,
        finish_reason=event.finish.reason if event.final else None,
        stop_reason=event.stop_reason,
        prompt_tokens=start.prompt_tokens,
        cached_tokens=start.cached_tokens,
        output_tokens=event.output_tokens,
    )
