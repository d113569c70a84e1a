"""GET /v1/cache/tree: the radix tree of the prefix cache."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.responses import Response

from minisrv.errors import InvalidRequestError
from minisrv.frontend.fields.schema import BOOLEAN, INTEGER, STRING, between
from minisrv.frontend.fields.table import Field, supported
from minisrv.frontend.http.access import require_admin
from minisrv.frontend.http.openapi import errors, query_parameters
from minisrv.frontend.http.paths import add_head_routes
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.wire.messages import DecodeMsg, ShowTreeMsg

DEFAULT_NODES = 2000
MAX_NODES = 20_000
TEXT_TOKENS = 24
# The scheduler may spend this share of its time on descriptions of the tree, however many ask; with
# packing and sending them that is less than 1 %.
MAX_SHARE = 0.007
_NODES_PER_TURN = 500

PARAMETERS: dict[str, Field] = {
    "max_nodes": supported(
        between(1, MAX_NODES, INTEGER),
        f"How many nodes to return, the most used first. Default: {DEFAULT_NODES}.",
    ),
    "request_id": supported(STRING, "The id of a request, whose path to return."),
    "text": supported(
        BOOLEAN, f"Return the text of the first {TEXT_TOKENS} tokens of each node. Default: false."
    ),
}


class TreeReader:
    """Asks the scheduler for its tree, one query at a time and no more often than MAX_SHARE has it.

    All methods belong to one event loop.
    """

    def __init__(self, registry: RequestRegistry) -> None:
        self._registry = registry
        self._turn = asyncio.Lock()
        self._next_at = 0.0

    async def read(self, max_nodes: int, uids: Sequence[int], num_tokens: int) -> dict[str, Any]:
        """The answer to a `ShowTreeMsg`. Raises as the registry's `ask`."""
        async with self._turn:
            await asyncio.sleep(self._next_at - time.monotonic())
            answer = await self._registry.ask(
                lambda query: ShowTreeMsg(
                    query=query, max_nodes=max_nodes, uids=tuple(uids), num_tokens=num_tokens
                ),
                tokenizer_index=0,
            )
            self._next_at = time.monotonic() + answer["seconds"] / MAX_SHARE
        return answer


def add_cache_tree_route(
    app: FastAPI, registry: RequestRegistry, reply_prefixes: Sequence[str]
) -> None:
    """Add /v1/cache/tree, for administrators.

    reply_prefixes: what reply ids have in front of the request id.
    """
    router = APIRouter(dependencies=[Depends(require_admin)])
    reader = TreeReader(registry)

    @router.get(
        "/v1/cache/tree",
        openapi_extra=query_parameters(PARAMETERS),
        responses=errors(400, 401, 403, 503),
        response_class=Response,
    )
    async def show_tree(request: Request) -> Response:
        """The nodes of the prefix cache's radix tree."""
        sent = dict(request.query_params)
        if unknown := sent.keys() - PARAMETERS.keys():
            name = sorted(unknown)[0]
            raise InvalidRequestError(f"{name} is not a parameter of this route", param=name)
        uids = _find_uids(registry, sent.get("request_id", ""), reply_prefixes)
        num_tokens = TEXT_TOKENS if _read_flag(sent, "text") else 0
        answer = await reader.read(_read_max_nodes(sent), uids, num_tokens)
        texts = await _read_texts(registry, answer) if num_tokens else None
        body = await _write(answer, texts, with_path="request_id" in sent)
        return Response(body, media_type="application/json")

    add_head_routes(router)
    app.include_router(router)


def _find_uids(registry: RequestRegistry, id: str, reply_prefixes: Sequence[str]) -> Sequence[int]:
    ids = [id, *(id.removeprefix(p) for p in reply_prefixes if id.startswith(p))]
    return next((uids for one in ids if (uids := registry.recent_uids(one))), ())


def _read_max_nodes(sent: dict[str, str]) -> int:
    text = sent.get("max_nodes", str(DEFAULT_NODES))
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if not 1 <= number <= MAX_NODES:
        raise InvalidRequestError(
            f"max_nodes is {text[:20]!r}; it must be an integer from 1 to {MAX_NODES}",
            param="max_nodes",
        )
    return number


def _read_flag(sent: dict[str, str], name: str) -> bool:
    text = sent.get(name, "false")
    if text not in ("true", "false"):
        raise InvalidRequestError(f"{name} must be true or false", param=name)
    return text == "true"


async def _read_texts(registry: RequestRegistry, answer: dict[str, Any]) -> list[str]:
    """The texts of the nodes' beginnings, each as JSON."""
    ids = np.array(answer["token_ids"], np.int32)
    lengths = np.array(answer["num_token_ids"], np.int32)
    decoded = await registry.ask(
        lambda query: DecodeMsg(
            query=query, token_ids=ids, skip_special_tokens=False, lengths=lengths
        )
    )
    texts: list[str] = decoded["texts"]
    return texts


async def _write(answer: dict[str, Any], texts: list[str] | None, *, with_path: bool) -> str:
    """The body. Other streams get a turn while the nodes are written."""
    page_size = answer["page_size"]
    columns = (answer[name] for name in ("id", "parent", "pages", "pins", "last_use"))
    rows = list(zip(*columns, strict=True))
    nodes: list[str] = []
    for start in range(0, len(rows), _NODES_PER_TURN):
        nodes += [
            f'{{"id":{id},"parent":{parent},"tokens":{pages * page_size},"pages":{pages},'
            f'"pins":{pins},"last_use_s":{last_use:.3f}'
            for id, parent, pages, pins, last_use in rows[start : start + _NODES_PER_TURN]
        ]
        await asyncio.sleep(0)
    if texts is not None:
        nodes = [f'{node},"text":{text}' for node, text in zip(nodes, texts, strict=True)]
    used, cached = answer["num_used_pages"], answer["num_tree_pages"]
    path = f',"path":{_ids(answer["path"])}' if with_path else ""
    return (
        f'{{"page_size":{page_size},"pages":{{"total":{answer["num_pages"]},"used":{used},'
        f'"tree":{cached}}},"num_nodes":{answer["num_nodes"]}{path},"nodes":['
        + ",".join(f"{node}}}" for node in nodes)
        + "]}"
    )


def _ids(path: list[int] | None) -> str:
    return "null" if path is None else f"[{','.join(map(str, path))}]"
