"""Parts of a conversation: objects whose `type` says what else they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.fields.schema import STRING, Schema, check_value, describe, object_of


def check_kind(part: Mapping[str, Any], schemas: Mapping[str, Schema], path: str) -> str:
    """The part's `type`, one of `schemas`, whose schema it fits. Raises InvalidRequestError."""
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in schemas:
        state = "missing" if kind is None else describe(kind)
        raise InvalidRequestError(
            f"{path}.type is {state}; this server takes {', '.join(schemas)} here",
            param=f"{path}.type",
            code="unsupported_parameter",
        )
    check_value(part, schemas[kind], path)
    return kind


def read_text(content: str | list[dict[str, Any]], names: Mapping[str, str], path: str) -> str:
    """The text of a string, or of all parts of a list. Raises InvalidRequestError.

    names: of the property that holds the text, for each type of part.
    """
    if isinstance(content, str):
        return content
    schemas = {kind: object_of([name], **{name: STRING}) for kind, name in names.items()}
    kinds = [check_kind(part, schemas, f"{path}.{i}") for i, part in enumerate(content)]
    return "".join(part[names[kind]] for part, kind in zip(content, kinds, strict=True))
