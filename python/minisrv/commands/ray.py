"""`minisrv ray CONFIG`: several servers on Ray Serve, as a file describes them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minisrv.errors import ConfigError, MinisrvError


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; exit status 2: the file is wrong, 1: failed."""
    options = _make_parser().parse_args(argv)
    try:
        _run(options.config, options.address)
    except MinisrvError as error:
        print(f"minisrv: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        pass  # before there was anything to end
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minisrv ray",
        description="Serve a model with several replicas on Ray Serve, behind one address.",
        epilog="docs/gateways.md lists what the file may hold.",
    )
    parser.add_argument(
        "config",
        type=Path,
        metavar="CONFIG",
        help="YAML or JSON: options of the server by their names in Python, such as model, port or "
        "max_seq_len, and num_replicas, max_replicas, router, num_cpus, num_gpus",
    )
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="of a Ray cluster (default: RAY_ADDRESS, the cluster of this machine, or a new one)",
    )
    return parser


def _run(path: Path, address: str | None) -> None:
    """Raises MinisrvError."""
    try:
        from minisrv.ray import deploy
    except ImportError as error:
        raise MinisrvError(
            f"minisrv ray needs the packages of the extra ray: pip install 'minisrv[ray]' ({error})"
        ) from None
    deploy.serve_until_stopped(_read(path), address)


def _read(path: Path) -> dict[str, Any]:
    """The file as a mapping. Raises ConfigError."""
    import yaml  # of the extra, too

    try:
        args = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: such as a 13th month
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(args, dict) or not all(isinstance(name, str) for name in args):
        raise ConfigError(f"{path} must be a mapping of names to values, such as `model: demo`")
    return args
