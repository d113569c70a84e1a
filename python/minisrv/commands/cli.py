"""The `minisrv` command."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

# Modules of this package.
COMMANDS = ("batch", "plan", "simulate", "chat", "bench", "launch", "doctor", "dashboard", "ray")
USAGE = """\
usage: minisrv serve MODEL [options]   serve a model over an OpenAI-compatible API
       minisrv batch MODEL --input FILE --output FILE [options]
                                       answer the prompts in a file
       minisrv plan MODEL --gpu NAME [options]
                                       compute from config.json whether a model fits on a GPU
       minisrv simulate MODEL --gpu NAME --trace FILE [options]
                                       play a trace against the scheduler in virtual time
       minisrv chat [MODEL|URL] [-q TEXT] [options]
                                       talk to a model in the terminal
       minisrv bench [--url URL] [options]
                                       measure a server with OpenAI's API under load
       minisrv launch CLIENT [--run] [options]
                                       start a coding agent with a running server: codex,
                                       opencode, qwen-code or claude
       minisrv doctor [--json]          show what this machine has, and what to do about it
       minisrv ray CONFIG               serve a model with several replicas on Ray Serve
       minisrv dashboard                print a dashboard for Grafana
       minisrv --version

Options: `minisrv COMMAND --help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status, SIGPIPE's if nobody reads its output any more."""
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def _run(argv: list[str]) -> int:
    match argv:
        case ["serve", *rest]:
            from minisrv import launch_server

            return launch_server.main(rest, prog="minisrv serve")
        case [command, *rest] if command in COMMANDS:
            status: int = import_module(f"minisrv.commands.{command}").main(rest)
            return status
        case ["--version", *_]:
            print(f"minisrv {version('minisrv')}")
            return 0
        case ["--help" | "-h", *_]:
            print(USAGE)
            return 0
        case [command, *_]:
            print(f"{USAGE}\n\nminisrv: unknown command {command!r}", file=sys.stderr)
        case _:
            print(USAGE, file=sys.stderr)
    return 2
