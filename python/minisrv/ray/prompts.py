"""The beginning of a request's prompt, as a router sees it without a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from minisrv.routing.prefix_index import hash_blocks
from minisrv.routing.router import Prompt

BYTES_PER_TOKEN = 4  # of English text, about
BLOCK_TOKENS = 64
# What precedes a conversation in most chat templates, in the order of these.
_BEFORE = ("cache_salt", "tools", "system", "instructions", "chat_template_kwargs")
_PROMPTS = ("messages", "prompt", "input", "text", "input_ids")


def prompt_of(body: bytes) -> Prompt:
    """A prompt of estimated tokens; an empty one for a body that holds none.

    Requests whose prompts begin with the same text have the same first blocks.
    """
    try:
        fields = json.loads(body)
        text = _text(fields) if isinstance(fields, dict) else ""
    except (ValueError, RecursionError):  # the replica refuses it
        text = ""
    data = text.encode("utf-8", "surrogatepass")
    data += bytes(-len(data) % BYTES_PER_TOKEN)
    ids = np.frombuffer(data, np.int32)
    return Prompt(hash_blocks(ids, BLOCK_TOKENS), len(ids), BLOCK_TOKENS)


def _text(fields: Mapping[str, Any]) -> str:
    parts = [fields[name] for name in _BEFORE if fields.get(name)]
    for name in _PROMPTS:
        value = fields.get(name)
        if isinstance(value, list):
            parts += value
        elif value:
            parts.append(value)
    return "\n".join(part if isinstance(part, str) else json.dumps(part) for part in parts)
