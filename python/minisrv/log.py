"""One log format for every process: time, process, level, event and figures."""

from __future__ import annotations

import logging
import sys

LEVELS = ("debug", "info", "warning", "error")


def setup(process: str, level: str = "info") -> None:
    """Send the records of minisrv to stderr with the process name before them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s {process:<11} %(levelname)-7s %(message)s", "%H:%M:%S")
    )
    logger = logging.getLogger("minisrv")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
