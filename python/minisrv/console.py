"""What a server prints where it was started: the progress of the start, then what is served."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from minisrv import log
from minisrv.checkpoint.chat_format import ChatFormat
from minisrv.config import ServerConfig
from minisrv.start_progress import SECONDS
from minisrv.supervision.records import DrainRequested, EngineReady, Notice, StartProgress
from minisrv.terminal_line import TerminalLine

_METER_COLUMNS = 68  # of 79, less those of the seconds before it


@dataclass(slots=True)
class _Phase:
    """A phase of the start, seen since `started_at`, when `first` of it was done."""

    name: str
    started_at: float
    first: float


class Console:
    """Prints to stdout; on a terminal each phase of the start is one line drawn in place."""

    def __init__(self, config: ServerConfig, port: int) -> None:
        host = f"[{config.host}]" if ":" in config.host else config.host
        scheme = "http" if config.ssl_certfile is None else "https"
        self._url = f"{scheme}://{host}:{port}"
        self._config = config
        self._started = time.monotonic()
        self._shown = ("", 0.0)
        self._line = log.terminal_line()
        self._phase = _Phase("", 0.0, 0.0)

    def announce(self) -> None:
        """Print where the server listens."""
        self._print(
            f"minisrv {version('minisrv')} listens on {self._url}, model {self._config.model}"
        )

    def show(self, notice: Notice) -> None:
        """Print a notice; progress that cannot be drawn in place only per quarter."""
        match notice:
            case StartProgress(phase, fraction):
                if self._line is not None and self._draw(self._line, notice):
                    return
                shown_phase, shown_fraction = self._shown
                if phase != shown_phase or fraction >= min(1.0, shown_fraction + 0.25):
                    self._shown = (phase, fraction)
                    self._print(f"{self._seconds:6.1f} s  {phase} {fraction:.0%}")
            case EngineReady(restarts=restarts) if restarts:
                self._print("all processes serve again")
            case EngineReady(facts):
                self._print(banner(self._config, self._url, facts, self._seconds))
            case DrainRequested():
                self._print(
                    f"stopping: open requests have {self._config.drain_timeout:g} s to end; "
                    "a second signal ends them at once"
                )

    def close(self) -> None:
        """Leave no line on the terminal that looks like work in progress."""
        if self._line is not None:
            self._line.keep()
            self._line.erase()

    def _draw(self, line: TerminalLine, progress: StartProgress) -> bool:
        now = time.monotonic()
        if progress.phase != self._phase.name:
            line.keep()
            self._phase = _Phase(progress.phase, now, progress.fraction)
        lead = f"{self._seconds:6.1f} s  "
        return line.show(lead + meter(progress, self._phase.first, now - self._phase.started_at))

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _print(self, text: str) -> None:
        if self._line is not None:
            self._line.keep()
            if sys.stdout.isatty():
                text = self._line.prefix + text  # another process may have drawn its own line
        text += "\n"  # one write, also with PYTHONUNBUFFERED: other processes write here too
        # A closed terminal must not end the server.
        encoding = sys.stdout.encoding or "utf-8"
        with contextlib.suppress(OSError):
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
            sys.stdout.flush()


def meter(progress: StartProgress, first: float, seconds: float) -> str:
    """The progress of a phase with its rate and the time left, as far as they are known.

    first: the fraction that was done `seconds` ago, when the phase began.
    """
    name, fraction, total = progress.phase, progress.fraction, progress.total
    if not total:
        return f"{name} {fraction:.0%}" if fraction else name
    if progress.unit == SECONDS:
        return f"{name}, once on this machine: {seconds:.0f} s of about {total:.0f} s"
    from tqdm import tqdm  # not before the server listens: it takes a moment

    return tqdm.format_meter(
        n=fraction * total,
        total=total,
        elapsed=seconds,
        ncols=_METER_COLUMNS,
        prefix=name,
        ascii=True,
        unit=progress.unit,
        unit_scale=True,
        initial=first * total,
    )


def banner(config: ServerConfig, url: str, facts: dict[str, Any], seconds: float) -> str:
    """The summary printed when the server is ready."""
    defaults = {k: v for k, v in facts["sampling_defaults"].items() if v is not None}
    sampling = ", ".join(f"{k} {v}" for k, v in defaults.items())
    lines = [
        f"ready after {seconds:.1f} s",
        f"  URL       {url}/v1",
        f"  page      {url}/",
        f"  openai    {openai_variables(config, url)}",
        f"  model     {config.served_name}, {facts['placement']}",
        f"  context   {facts['max_seq_len']} tokens",
        "  memory    " + facts["memory_plan"].replace("\n", "\n" + " " * 12),
        f"  sampling  {sampling} ({facts['sampling_source']})"
        if sampling
        else "  sampling  OpenAI's defaults",
    ]
    if facts["unapplied_defaults"]:
        lines.append(f"  not used  {', '.join(facts['unapplied_defaults'])}")
    if ChatFormat.from_dict(facts["chat_format"]).needs_description:
        lines.append("  tools     described in a system turn: the chat template takes none")
    lines += [f"  note      {note}" for note in facts["notes"]]
    return "\n".join(lines)


def openai_variables(config: ServerConfig, url: str) -> str:
    """The shell's line after which a client of the `openai` packages speaks to this server."""
    needs_key = config.api_key or config.api_key_file or config.admin_key is not None
    key = "YOUR_KEY" if needs_key else "none"
    return f"export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}"
