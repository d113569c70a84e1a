"""What every route works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minisrv.config import ServerConfig
from minisrv.frontend.generation.request import ChatPrompt
from minisrv.frontend.generation.run import Runner
from minisrv.frontend.http.body import BodyReader
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.wire.messages import EncodeMsg


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
        self, prompt: str | ChatPrompt, *, add_special_tokens: bool = False
    ) -> dict[str, Any]:
        """The prompt's `text`, `ids` and `tokens`. Raises RequestFailedError."""
        fields = {"prompt": prompt} if isinstance(prompt, str) else prompt.fields()
        return await self.registry.ask(
            lambda query: EncodeMsg(query=query, add_special_tokens=add_special_tokens, **fields)
        )
