"""The routes over stored responses: to read, list the input of, delete and cancel one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.responses.history import GiveWay, Item, read_input
from minisrv.frontend.apis.responses.store import ResponseStore
from minisrv.frontend.http.access import key_number_of
from minisrv.frontend.http.openapi import errors

_PATH = "/v1/responses/{response_id}"
_MAX_LISTED, _DEFAULT_LISTED = 100, 20


def add_stored_routes(app: FastAPI, store: ResponseStore, give_way: GiveWay) -> None:
    """Add the routes. A response of another key does not exist for a client."""

    @app.get(_PATH, responses=errors(400, 404))
    async def retrieve_response(request: Request, response_id: str) -> Response:
        """A stored response, as it was sent."""
        if request.query_params.get("stream", "false") != "false":
            raise InvalidRequestError(
                "stream is not supported here: only whole responses are stored", param="stream"
            )
        found = store.get(key_number_of(request.scope), response_id, "response_id")
        return Response(found.body, media_type="application/json")

    @app.delete(_PATH, responses=errors(404))
    async def delete_response(request: Request, response_id: str) -> Response:
        """Forget a stored response."""
        store.delete(key_number_of(request.scope), response_id, "response_id")
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @app.get(f"{_PATH}/input_items", responses=errors(400, 404))
    async def list_input_items(request: Request, response_id: str) -> Response:
        """The items that a stored response answers, those of the responses before it included."""
        found = store.get(key_number_of(request.scope), response_id, "response_id")
        items = await read_input(found, give_way)
        return JSONResponse(_page(items, request.query_params))

    @app.post(f"{_PATH}/cancel", responses=errors(400, 404))
    async def cancel_response(request: Request, response_id: str) -> Response:
        """A 400 or 404: what is stored has ended, and nothing runs in the background."""
        store.get(key_number_of(request.scope), response_id, "response_id")
        raise InvalidRequestError(
            f"response_id is {response_id[:80]!a}, which has ended; nothing runs in the background",
            param="response_id",
        )


def _page(items: list[Item], params: Mapping[str, str]) -> dict[str, Any]:
    """The part of a list that `order`, `after` and `limit` ask for."""
    order, limit = params.get("order", "desc"), params.get("limit", str(_DEFAULT_LISTED))
    if order not in ("asc", "desc"):
        raise InvalidRequestError(f"order is {order[:40]!a}; it must be asc or desc", param="order")
    if not (limit.isdecimal() and len(limit) < 4 and 1 <= int(limit) <= _MAX_LISTED):
        raise InvalidRequestError(
            f"limit is {limit[:40]!a}; it must be an integer from 1 to {_MAX_LISTED}", param="limit"
        )
    ordered = items if order == "asc" else items[::-1]
    begin = 0
    if after := params.get("after"):
        places = [i for i, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise InvalidRequestError(
                f"after is {after[:80]!a}, which is not the id of an item", param="after"
            )
        begin = places[-1] + 1
    page = ordered[begin : begin + int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": begin + len(page) < len(ordered),
    }
