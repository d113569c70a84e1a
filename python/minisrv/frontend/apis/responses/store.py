"""Responses that were asked to be stored: in memory, bounded in bytes, each for one API key.

A response refers to those that it continues, so a conversation is kept once, not once a turn. What
an evicted response holds is freed when no later response refers to it. Pure: no I/O.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from minisrv.errors import InvalidRequestError

# Rough sizes of the Python objects around the bytes of a response, of an item and of an id.
_RESPONSE_BYTES, _ITEM_BYTES, _ID_BYTES = 1000, 50, 250


@dataclass(eq=False, slots=True, kw_only=True)
class StoredResponse:
    """owner: number of the API key. body: JSON. input: JSON of each item, as it was sent.

    output_ids: of its items. previous: the response that it continues. referred: by id of an item
    that its input only refers to, the response whose output holds the item.
    """

    id: str
    owner: int
    body: bytes
    input: tuple[bytes, ...]
    output_ids: tuple[str, ...]
    previous: StoredResponse | None = None
    referred: Mapping[str, StoredResponse] = field(default_factory=dict)
    num_users: int = 0  # the store, and other responses that are kept

    @property
    def num_bytes(self) -> int:
        """Without what it refers to."""
        ids = len(self.output_ids) + len(self.referred)
        texts = len(self.body) + sum(map(len, self.input))
        return texts + _RESPONSE_BYTES + _ITEM_BYTES * len(self.input) + _ID_BYTES * ids

    def uses(self) -> Iterator[StoredResponse]:
        """The responses that it cannot be read without."""
        if self.previous is not None:
            yield self.previous
        yield from self.referred.values()


class ResponseStore:
    """Keeps what was used last in `max_bytes`; 0 stores nothing."""

    def __init__(self, max_bytes: int) -> None:
        self.used_bytes = 0
        self._max_bytes = max_bytes
        self._responses: OrderedDict[tuple[int, str], StoredResponse] = OrderedDict()
        self._by_item: dict[tuple[int, str], StoredResponse] = {}

    def __len__(self) -> int:
        return len(self._responses)

    @property
    def is_on(self) -> bool:
        return self._max_bytes > 0

    def add(self, response: StoredResponse) -> None:
        """Keep a response, at the cost of those whose use is longest ago."""
        key = (response.owner, response.id)
        if key in self._responses:
            self._drop(key)
        self._responses[key] = response
        for id in response.output_ids:
            self._by_item[response.owner, id] = response
        self._retain(response)
        while self.used_bytes > self._max_bytes and self._responses:
            self._drop(next(iter(self._responses)))

    def get(self, owner: int, id: str, param: str) -> StoredResponse:
        """The response, which counts as a use. Raises InvalidRequestError, a 404 about `param`."""
        if (found := self._responses.get((owner, id))) is None:
            raise self._not_found(f"{param} is {id[:80]!a}", param)
        self._responses.move_to_end((owner, id))
        return found

    def holder_of(self, owner: int, item_id: str, param: str) -> StoredResponse:
        """As `get`, the response whose output holds an item."""
        if (found := self._by_item.get((owner, item_id))) is None:
            raise self._not_found(f"{param} is {item_id[:80]!a}", param)
        self._responses.move_to_end((owner, found.id))
        return found

    def delete(self, owner: int, id: str, param: str) -> None:
        """Raises as `get`. Responses that continue this one can still be continued."""
        self.get(owner, id, param)
        self._drop((owner, id))

    def _drop(self, key: tuple[int, str]) -> None:
        response = self._responses.pop(key)
        for id in response.output_ids:
            del self._by_item[response.owner, id]
        self._release(response)

    def _retain(self, response: StoredResponse) -> None:
        _count_users(response, 1, self._add_bytes)

    def _release(self, response: StoredResponse) -> None:
        _count_users(response, -1, self._add_bytes)

    def _add_bytes(self, num_bytes: int) -> None:
        self.used_bytes += num_bytes

    def _not_found(self, what: str, param: str) -> InvalidRequestError:
        kept = f"the last {self._max_bytes} bytes" if self.is_on else "none"
        return InvalidRequestError(
            f"{what}, which is not among the responses that this server stores: {kept} "
            "(--response-store-bytes). Send store: false, and the whole conversation as input",
            param=param,
            code="previous_response_not_found" if param == "previous_response_id" else None,
            status=404,
        )


def _count_users(response: StoredResponse, change: int, add_bytes: Callable[[int], None]) -> None:
    """Add or remove (`change` is 1 or -1) a user, and with the first or last one its bytes."""
    changed = [response]
    while changed:
        one = changed.pop()
        before, one.num_users = one.num_users, one.num_users + change
        if 0 in (before, one.num_users):
            add_bytes(change * one.num_bytes)
            changed += one.uses()
