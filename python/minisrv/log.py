"""One log format for every process: time, process, level, event and its values.

As text a line reads `event name=value ...`; as JSON each value is a key of the object.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

from minisrv.terminal_line import TerminalLine, open_terminal_line

_terminal_line: TerminalLine | None = None


def setup(
    process: str,
    level: str = "info",
    format: str = "text",
    *,
    own_process: bool = False,
    owner: int = 0,
) -> None:
    """Write minisrv's log records to stderr, each with the name of the process.

    own_process: in the same form also the warnings and errors of other packages.
    owner: the process that the user has started in a terminal, which may have a line that is drawn
    in place (`terminal_line`); 0 for none.
    """
    global _terminal_line
    _terminal_line = open_terminal_line(owner) if owner and format == "text" else None
    handler = _StderrHandler() if _terminal_line is None else _TerminalHandler(_terminal_line)
    text = logging.Formatter(f"%(asctime)s {process:<11} %(levelname)-7s %(message)s", "%H:%M:%S")
    handler.setFormatter(_JsonFormatter(process) if format == "json" else text)
    logger = logging.getLogger("minisrv")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
    if own_process:
        logging.getLogger().handlers[:] = [handler]
        logging.captureWarnings(True)


def terminal_line() -> TerminalLine | None:
    """The line of this process; None where only plain text is wanted."""
    return _terminal_line


def event(logger: logging.Logger, level: int, name: str, values: dict[str, Any]) -> None:
    """Log an event. Values must be safe to print: no text from a client unless it is escaped."""
    text = "".join(f" {key}={value}" for key, value in values.items())
    logger.log(level, "%s%s", name, text, extra={"event": name, "values": values})


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what is stderr at the time: a program may replace it and close the earlier one."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _TerminalHandler(_StderrHandler):
    """Erases the line that is drawn in place, and draws it again below the record."""

    def __init__(self, line: TerminalLine) -> None:
        super().__init__()
        self._line = line

    def format(self, record: logging.LogRecord) -> str:
        return self._line.prefix + super().format(record)

    def emit(self, record: logging.LogRecord) -> None:
        self.terminator = "\n" + self._line.text
        super().emit(record)


class _JsonFormatter(logging.Formatter):
    """One JSON object per line, in ASCII."""

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
            **getattr(record, "values", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
