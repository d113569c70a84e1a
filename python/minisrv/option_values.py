"""Options whose text has a form of its own: sizes, URLs, path prefixes, template variables."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from minisrv.errors import ConfigError

# Variables of a chat template that the server sets itself.
RESERVED_VARIABLES = (
    *("messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize"),
)
_SIZE_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def parse_size(text: str) -> int:
    """The bytes of 512MiB, 4GB or 1000000; all units are powers of 1024. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    if match is None:
        raise ConfigError(f"invalid size {text!r}; use a value such as 512MiB or 4GiB")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def read_path_prefix(text: str, name: str) -> str:
    """A path without a slash at its end, "" for "/". Raises ConfigError naming the option."""
    plain = text.isascii() and text.isprintable() and not set(text) & set(" %?#")
    if not text.startswith("/") or not plain or "//" in text:
        raise ConfigError(f"{flag(name)} is {text!r}; it must be a path such as /llm")
    return text.rstrip("/")


def read_chat_template_kwargs(text: str) -> dict[str, Any]:
    """The variables of --chat-template-kwargs. Raises ConfigError."""
    name = flag("chat_template_kwargs")
    try:
        variables = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(variables, dict):
        raise ConfigError(f"{name} is {text[:60]!r}; it must be a JSON object")
    for reserved in RESERVED_VARIABLES:
        if reserved in variables:
            raise ConfigError(f"{name} may not set {reserved}; the server sets it")
    return variables


def read_endpoint(text: str, name: str) -> str:
    """The ZeroMQ endpoint to listen at, such as tcp://*:5557; of a port, that on loopback.

    Raises ConfigError naming the option.
    """
    if text.isascii() and text.isdigit():
        text = f"tcp://127.0.0.1:{text}"
    match = re.fullmatch(r"tcp://(?:\*|[\w.-]+|\[[0-9a-fA-F:]+\]):(\d{1,5})|ipc://(/\S+)", text)
    if match is None or (match[1] and not 0 < int(match[1]) < 65536):
        raise ConfigError(
            f"{flag(name)} is {text!r}; it must be a port, tcp://ADDRESS:PORT or ipc:///PATH"
        )
    return text


def read_server_url(text: str) -> str:
    """The URL of a server to send requests to, without slashes at its end. Raises ConfigError."""
    try:
        parts = urlsplit(text)
        (parts.hostname or "").encode("idna")
        plain = text.isascii() and text.isprintable() and not set(text) & set(" @?#")
        valid = plain and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"{text} is not the URL of a server, such as http://127.0.0.1:8000")
    return text.rstrip("/")


def authorization(api_key: str) -> dict[str, str]:
    """The header that carries a key to a server, none for "". Raises ConfigError."""
    key = api_key.strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("the API key has characters that no HTTP header may contain")
    return {"Authorization": f"Bearer {key}"} if key else {}


def check_output(path: Path | None) -> None:
    """Raises ConfigError if a file cannot be written, before the work whose result it will hold."""
    if path is None:
        return
    place = path if path.exists() else path.parent
    if path.is_dir():
        reason = "it is a directory"
    elif not path.exists() and not place.is_dir():
        reason = f"there is no directory {place}"
    elif not os.access(place, os.W_OK):
        reason = f"{place} is not writable"
    else:
        return
    raise ConfigError(f"{path} cannot be written: {reason}")
