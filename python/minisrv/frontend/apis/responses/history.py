"""The conversation that a response continues: stored responses, and items that it refers to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jiter

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.responses.store import ResponseStore, StoredResponse
from minisrv.frontend.http.body_size import PIECE_BYTES
from minisrv.frontend.http.sse import encode_json

Item = dict[str, Any]
GiveWay = Callable[[], Awaitable[None]]

_ITEMS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """past: the items before the input. given: the input, with items instead of references.

    previous, referred: as in the StoredResponse that this will be.
    """

    past: list[Item]
    given: str | list[Item] | None
    previous: StoredResponse | None = None
    referred: Mapping[str, StoredResponse] = field(default_factory=dict)


async def read_history(
    fields: Mapping[str, Any], store: ResponseStore, owner: int, give_way: GiveWay
) -> History:
    """What `previous_response_id` and `input` stand for, read in pieces.

    Raises InvalidRequestError for what the store does not have.
    """
    previous = None
    if "previous_response_id" in fields:
        previous = store.get(owner, fields["previous_response_id"], "previous_response_id")
    given = fields.get("input")
    items = given if isinstance(given, list) else []
    referred: dict[str, StoredResponse] = {}
    for i, item in enumerate(items):
        if _is_reference(item):
            id, path = item["id"], f"input.{i}.id"
            if id in referred:
                raise InvalidRequestError(f"{path} is {id[:80]!a} a second time", param=path)
            referred[id] = store.holder_of(owner, id, path)
    if len(items) > _ITEMS_AT_ONCE:
        await give_way()
    reader = _Reader(give_way)
    past = await reader.conversation(previous) if previous is not None else []
    if referred:
        given = [await reader.resolved(item, referred) for item in items]
    return History(past=past, given=given, previous=previous, referred=referred)


async def read_input(response: StoredResponse, give_way: GiveWay) -> list[Item]:
    """All items that a stored response answers, as the API lists them, each with an id."""
    reader = _Reader(give_way)
    items = await reader.conversation(response.previous) if response.previous else []
    items += await reader.input(response)
    seen: set[str] = set()
    listed = []
    for i, item in enumerate(items):
        # An id is a place in the list, but an item may be referred to where it is part of the past.
        id = item["id"] if item["id"] not in seen else f"{item['id']}_{i}"
        seen.add(id)
        listed.append({**_listed(item), "id": id})
    return listed


async def encode_input(given: str | list[Item], give_way: GiveWay) -> tuple[bytes, ...]:
    """The JSON of each item of an input, written in pieces."""
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    encoded, size = [], 0
    for item in items:
        encoded.append(encode_json(item).encode())
        size += len(encoded[-1]) + 100
        if size > PIECE_BYTES:
            await give_way()
            size = 0
    return tuple(encoded)


class _Reader:
    """Reads stored responses, each of them once."""

    def __init__(self, give_way: GiveWay) -> None:
        self._give_way = give_way
        self._size = 0
        self._outputs: dict[StoredResponse, list[Item]] = {}

    async def conversation(self, last: StoredResponse) -> list[Item]:
        """The items of a response and of those before it: inputs and outputs."""
        chain = [last]
        while chain[-1].previous is not None:
            chain.append(chain[-1].previous)
        items: list[Item] = []
        for response in reversed(chain):
            items += await self.input(response)
            items += await self._output(response)
        return items

    async def input(self, response: StoredResponse) -> list[Item]:
        """The response's own input. Items that came without an id have one from their place."""
        items = []
        for i, data in enumerate(response.input):
            item = await self.resolved(await self._parse(data), response.referred)
            own = item.get("id")
            id = own if isinstance(own, str) else f"item_{response.id}_{i}"
            items.append({**item, "id": id})
        return items

    async def resolved(self, item: Item, referred: Mapping[str, StoredResponse]) -> Item:
        """The item itself, or the one that it refers to."""
        if not _is_reference(item):
            return item
        output = await self._output(referred[item["id"]])
        return next(found for found in output if found["id"] == item["id"])

    async def _output(self, response: StoredResponse) -> list[Item]:
        if response not in self._outputs:
            self._outputs[response] = (await self._parse(response.body))["output"]
        return self._outputs[response]

    async def _parse(self, data: bytes) -> Any:
        self._size += len(data) + 100
        if self._size > PIECE_BYTES:
            await self._give_way()
            self._size = 0
        return jiter.from_json(data, cache_mode="keys")


def _is_reference(item: Item) -> bool:
    kind = item.get("type")
    is_one = kind == "item_reference" or (kind is None and "role" not in item)
    return is_one and isinstance(item.get("id"), str)


def _listed(item: Item) -> Item:
    """An item of the input in the full form of the API."""
    item = {"type": "message", **item, "status": item.get("status") or "completed"}
    content = item.get("content")
    if item["type"] != "message" or not isinstance(content, str):
        return item
    if item["role"] == "assistant":
        part = {"type": "output_text", "text": content, "annotations": [], "logprobs": []}
    else:
        part = {"type": "input_text", "text": content}
    return {**item, "content": [part]}
