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


class TextParts:
    """The types of parts that a content may have, all of which are text."""

    def __init__(self, **names: str) -> None:
        """names: of the property that holds the text, for each type."""
        self._names = names
        self._schemas = {kind: object_of([name], **{name: STRING}) for kind, name in names.items()}

    def read(self, content: str | list[dict[str, Any]], path: str) -> str:
        """The text of a string, or of all parts of a list. Raises InvalidRequestError."""
        if isinstance(content, str):
            return content
        for i, part in enumerate(content):
            check_kind(part, self._schemas, f"{path}.{i}")
        return "".join([part[self._names[part["type"]]] for part in content])
