"""What /openapi.json and /docs say about bodies and errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from minisrv.frontend.fields.schema import Schema
from minisrv.frontend.fields.table import Field, request_schema
from minisrv.frontend.http.error_format import ERROR_SCHEMA


def describe_errors(app: FastAPI, public_paths: frozenset[str]) -> None:
    """Add a 401 to operations that need a key, and remove the framework's 422.

    No route declares a parameter that could be invalid.
    """
    build = app.openapi

    def openapi() -> dict[str, Any]:
        document = build()
        for path, item in document["paths"].items():
            for operation in item.values():
                operation["responses"].pop("422", None)
                if path not in public_paths:
                    operation["responses"].setdefault("401", errors(401)[401])
        document.pop("components", None)  # only the 422 refers to them
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def request_body(table: Mapping[str, Field], *, required: bool = True) -> dict[str, Any]:
    """The `openapi_extra` of a route that takes a body."""
    content = {"application/json": {"schema": request_schema(table)}}
    return {"requestBody": {"required": required, "content": content}}


def query_parameters(table: Mapping[str, Field]) -> dict[str, Any]:
    """The `openapi_extra` of a route with optional parameters in its URL."""
    named = [{"name": name, "in": "query", "schema": table[name].schema} for name in table]
    return {"parameters": named}


def errors(*statuses: int, schema: Schema = ERROR_SCHEMA) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may send an error object with these statuses."""
    content = {"application/json": {"schema": schema}}
    return {status: {"description": "Error", "content": content} for status in statuses}
