"""Arguments of tool calls in a conversation, as chat templates print them."""

from __future__ import annotations

from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.http.body import parse_json


def read_arguments(arguments: Any) -> Any:
    """The object in a JSON text; text that is not a JSON object stays text."""
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        value = parse_json(arguments.encode()) if arguments.strip() else {}
    except InvalidRequestError:
        return arguments
    return value if isinstance(value, dict) else arguments
