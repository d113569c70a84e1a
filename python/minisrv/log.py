"""One log format for every process: time, process, level, event and figures.

As text a line reads `event name=value ...`; as JSON the figures are keys of their own.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

LEVELS = ("debug", "info", "warning", "error")


def setup(process: str, level: str = "info", format: str = "text") -> None:
    """Send the records of minisrv to stderr with the process name before them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(process) if format == "json" else _text(process))
    logger = logging.getLogger("minisrv")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def event(logger: logging.Logger, level: int, name: str, figures: dict[str, Any]) -> None:
    """Log an event with its figures. Values must be safe to print: nothing that a client wrote."""
    text = "".join(f" {key}={value}" for key, value in figures.items())
    logger.log(level, "%s%s", name, text, extra={"event": name, "figures": figures})


def _text(process: str) -> logging.Formatter:
    return logging.Formatter(f"%(asctime)s {process:<11} %(levelname)-7s %(message)s", "%H:%M:%S")


class _JsonFormatter(logging.Formatter):
    """An object a line, in ASCII."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "process": self._process,
            "level": record.levelname.lower(),
            "event": getattr(record, "event", None) or record.getMessage(),
            **getattr(record, "figures", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
