"""The `minisrv` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version

USAGE = """\
usage: minisrv serve MODEL [options]   serve a model over an OpenAI-compatible API
       minisrv batch ... [options]     answer the prompts of a file
       minisrv plan MODEL --card NAME [options]
                                      what fits on a GPU, from config.json alone
       minisrv --version

`minisrv serve --help`, `minisrv batch --help` and `minisrv plan --help` list the options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    command, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    rest = rest[:-1]
    match command:
        case "serve":
            from minisrv import launch_server

            return launch_server.main(rest, prog="minisrv serve")
        case "batch":
            from minisrv.commands import batch

            return batch.main(rest)
        case "plan":
            from minisrv.commands import plan

            return plan.main(rest)
        case "--version":
            print(f"minisrv {version('minisrv')}")
            return 0
        case "--help" | "-h":
            print(USAGE)
            return 0
    problem = f"\n\nminisrv: there is no command {command!r}" if command else ""
    print(USAGE + problem, file=sys.stderr)
    return 2
