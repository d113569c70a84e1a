"""Arguments of earlier tool calls: a chat holds them as JSON text, templates print objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def with_read_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with the arguments of its calls as objects."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**function, "arguments": read_arguments(function.get("arguments"))}}
        for call in message["tool_calls"]
        for function in [call["function"]]
    ]
    return {**message, "tool_calls": calls}


def read_arguments(arguments: Any) -> Any:
    """The object in a JSON text, as Python reads it: a model wrote it, so it need not be strict.

    Text that is not a JSON object stays text, and so does one with half a surrogate pair, which no
    prompt can hold.
    """
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        value = json.loads(arguments) if arguments.strip() else {}
        if "\\ud" in arguments.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
