"""What /openapi.json and /docs say of bodies and errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from minisrv.frontend.fields.table import Field, request_schema
from minisrv.frontend.http.error_format import ERROR_SCHEMA


def describe_errors(app: FastAPI, public_paths: frozenset[str]) -> None:
    """Have the application's document say 401 where a key is needed, and not the framework's 422.

    No route declares a parameter that a path could have wrong.
    """
    build = app.openapi

    def openapi() -> dict[str, Any]:
        document = build()
        for path, item in document["paths"].items():
            for operation in item.values():
                operation["responses"].pop("422", None)
                if path not in public_paths:
                    operation["responses"].setdefault("401", errors(401)[401])
        document.pop("components", None)  # those of the 422 alone
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def request_body(table: Mapping[str, Field], *, required: bool = True) -> dict[str, Any]:
    """The body that a route takes."""
    content = {"application/json": {"schema": request_schema(table)}}
    return {"requestBody": {"required": required, "content": content}}


def errors(
    *statuses: int, schema: dict[str, Any] = ERROR_SCHEMA
) -> dict[int | str, dict[str, Any]]:
    """Statuses that come with an error object."""
    content = {"application/json": {"schema": schema}}
    return {status: {"description": "Error", "content": content} for status in statuses}
