"""What every route works with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from minisrv.config import ServerConfig
from minisrv.frontend.generation.request import ChatPrompt
from minisrv.frontend.generation.run import Runner
from minisrv.frontend.http.body import BodyReader
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.wire.messages import EncodeMsg, Query


@dataclass(frozen=True, slots=True)
class Service:
    """config: of the server. registry: the model, and the way to the other processes.

    bodies: reads request bodies. runner: answers generation requests.
    """

    config: ServerConfig
    registry: RequestRegistry
    bodies: BodyReader
    runner: Runner

    async def encode(
        self, request: Request, prompt: str | ChatPrompt, *, add_special_tokens: bool = False
    ) -> dict[str, Any]:
        """The prompt's `text`, `ids` and `tokens` as JSON, and their `count`. Raises as `ask`."""
        return await self._encode(request, prompt, add_special_tokens, show_tokens=True)

    async def count(self, request: Request, prompt: ChatPrompt) -> int:
        """The number of the prompt's tokens. Raises as `ask`."""
        answer = await self._encode(request, prompt, add_special_tokens=False, show_tokens=False)
        return int(answer["count"])

    async def _encode(
        self,
        request: Request,
        prompt: str | ChatPrompt,
        add_special_tokens: bool,
        show_tokens: bool,
    ) -> dict[str, Any]:
        await asyncio.sleep(0)  # as before a generation
        fields = {"prompt": prompt} if isinstance(prompt, str) else prompt.fields()
        return await self.ask(
            request,
            lambda query: EncodeMsg(
                query=query,
                add_special_tokens=add_special_tokens,
                show_tokens=show_tokens,
                **fields,
            ),
        )

    async def ask(self, request: Request, make: Callable[[int], Query]) -> dict[str, Any]:
        """The answer to a client's query, which is dropped when the client leaves.

        Raises ClientDisconnect, and as the registry's `ask`.
        """
        answer = asyncio.create_task(self.registry.ask(make))
        gone = asyncio.create_task(_wait_until_gone(request.receive))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ClientDisconnect
            return answer.result()
        finally:
            answer.cancel()
            gone.cancel()


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
