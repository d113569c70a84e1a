"""What /docs says of bodies and errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisrv.frontend.http_errors import ERROR_SCHEMA
from minisrv.frontend.openai_types import Field, request_schema


def request_body(table: Mapping[str, Field]) -> dict[str, Any]:
    """The body that a route takes."""
    content = {"application/json": {"schema": request_schema(table)}}
    return {"requestBody": {"required": True, "content": content}}


def errors(
    *statuses: int, schema: dict[str, Any] = ERROR_SCHEMA
) -> dict[int | str, dict[str, Any]]:
    """Statuses that come with an error object."""
    content = {"application/json": {"schema": schema}}
    return {status: {"description": "Error", "content": content} for status in statuses}
