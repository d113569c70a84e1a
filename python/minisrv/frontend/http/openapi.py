"""What /openapi.json and /docs say about bodies and errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from minisrv.frontend.fields.schema import Schema
from minisrv.frontend.fields.table import Field, request_schema
from minisrv.frontend.http.error_format import ERROR_SCHEMA

EXAMPLE_MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]
SECURITY_SCHEME = "bearer"


def describe_access(
    app: FastAPI, public_paths: frozenset[str], *, needs_key: bool, root_path: str
) -> None:
    """Add how requests carry a key, the 401 of operations that need one, and the path prefix.

    needs_key: no request is served without a key, except to `public_paths`.
    The framework's 422 is removed: no route declares a parameter that could be invalid.
    """
    build = app.openapi
    with_key: list[dict[str, list[str]]] = [{SECURITY_SCHEME: []}]
    security = with_key if needs_key else [*with_key, {}]

    def openapi() -> dict[str, Any]:
        document = build()
        for path, item in document["paths"].items():
            for operation in item.values():
                operation["responses"].pop("422", None)
                if path not in public_paths:
                    operation["responses"].setdefault("401", errors(401)[401])
                    operation["security"] = security
        # Nothing but the 422 refers to the components of the framework.
        document["components"] = {
            "securitySchemes": {SECURITY_SCHEME: {"type": "http", "scheme": "bearer"}}
        }
        if root_path:
            document["servers"] = [{"url": root_path}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def request_body(
    table: Mapping[str, Field], example: Mapping[str, Any], *, required: bool = True
) -> dict[str, Any]:
    """The `openapi_extra` of a route that takes a body. example: one that is answered."""
    content = {"application/json": {"schema": request_schema(table), "example": example}}
    return {"requestBody": {"required": required, "content": content}}


def query_parameters(table: Mapping[str, Field]) -> dict[str, Any]:
    """The `openapi_extra` of a route with optional parameters in its URL."""
    named = [{"name": name, "in": "query", "schema": table[name].schema} for name in table]
    return {"parameters": named}


def errors(*statuses: int, schema: Schema = ERROR_SCHEMA) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may send an error object with these statuses."""
    content = {"application/json": {"schema": schema}}
    return {status: {"description": "Error", "content": content} for status in statuses}
