"""The flags of the command line, one per field of `ServerConfig`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from minisrv.config import ServerConfig, choices_of, plain_type
from minisrv.errors import ConfigError
from minisrv.option_values import flag


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per field. A flag that is not given leaves no value in the namespace."""
    for f in fields(ServerConfig):
        kind, text = plain_type(f.name), f.metadata["help"]
        if f.default is not None and kind not in (bool, tuple):
            text += f" (default: {f.default})"
        name = flag(f"no_{f.name}" if f.default is True else f.name)
        if kind is bool:
            how: dict[str, Any] = {"action": "store_false" if f.default else "store_true"}
        elif choices := choices_of(f.name):
            how = {"choices": choices}
        elif kind is tuple:
            how = {"action": "append", "metavar": "X"}
        else:
            how = {"type": kind, "metavar": "X"}
        names = [name, *f.metadata["aliases"]]
        parser.add_argument(*names, dest=f.name, default=argparse.SUPPRESS, help=text, **how)


def split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before and after the first `--`."""
    own, after = list(argv), []
    if "--" in own:
        end = own.index("--")
        own, after = own[:end], own[end + 1 :]
    return own, after


def parse_command_line(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[ServerConfig, argparse.Namespace]:
    """The server's options, whose flags override the environment, and all flags of `parser`.

    Exits with status 2 on an error.
    """
    add_flags(parser)
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    given = dict(vars(options))
    positional = given.pop("positional_model")
    if positional is not None and given.setdefault("model", positional) != positional:
        parser.error(f"two models are given: {positional} and {given['model']}")
    known = {f.name for f in fields(ServerConfig)}
    try:
        config = ServerConfig.from_environment(**{k: v for k, v in given.items() if k in known})
    except ConfigError as error:
        parser.error(error.message)
    return config, options
