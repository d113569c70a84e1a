"""The shell of `minisrv chat`: reads questions and commands, and shows answers as they arrive."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.table import Table

from minisrv.commands.chat_client import Answer, ChatClient, ChatError, Message
from minisrv.commands.chat_text import MarkdownStyle, coloured, printable
from minisrv.user_cache import user_cache

_MARK_PASTES, _MARK_NO_PASTES = "\x1b[?2004h", "\x1b[?2004l"
_KEYS = "Alt-Enter: new line, Ctrl-C: stop the answer, Ctrl-D: end, /help: commands"


@dataclass
class Conversation:
    """What is sent with the next question. settings: further fields of the request."""

    system: str = ""
    turns: list[Message] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> list[Message]:
        """The system prompt and all turns."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]


class Screen:
    """Where answers are shown: a terminal with colours unless NO_COLOR is set, or a plain file."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def note(self, text: str, style: str = "dim") -> None:
        """A line that is not part of an answer."""
        self.console.print(
            printable(text), style=style, markup=False, highlight=False, soft_wrap=True
        )

    def show(self, client: ChatClient, conversation: Conversation, answer: Answer) -> None:
        """Ask, and write what arrives; only the answer itself to a file. Raises ChatError."""
        markdown, kind = MarkdownStyle(), ""
        deltas = client.stream(conversation.messages, conversation.settings, answer)
        with contextlib.closing(deltas):
            for delta in deltas:
                if not self.console.is_terminal:
                    if delta.kind == "answer":
                        self.console.file.write(delta.text)
                        self.console.file.flush()
                    continue
                if kind == "reasoning" and delta.kind == "answer":
                    self._write("\n\n", "")
                kind, text = delta.kind, printable(delta.text)
                pieces = [(text, "dim")] if kind == "reasoning" else markdown.feed(text)
                for piece, style in pieces:
                    self._write(piece, style)
                self.console.file.flush()

    def end_line(self) -> None:
        """After an answer, whether it ends or breaks off."""
        self.control("\n")

    def control(self, text: str) -> None:
        """Write to the terminal at once."""
        self.console.file.write(text)
        self.console.file.flush()

    def _write(self, text: str, style: str) -> None:
        plain = self.console.no_color or self.console.is_dumb_terminal
        self.console.file.write(text if plain else coloured(text, style))


class Shell:
    """A conversation in a terminal."""

    def __init__(self, client: ChatClient, conversation: Conversation, screen: Screen) -> None:
        self._client, self._conversation, self._screen = client, conversation, screen
        self._answers: list[Answer] = []
        self._saved: set[Path] = set()
        self._session: PromptSession[str] = PromptSession(
            history=_history(),
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation="... ",
            reserve_space_for_menu=0,
        )
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/system": ("TEXT: set the system prompt, or without a text remove it", self._system),
            "/set": ("NAME VALUE: send a field such as temperature; without VALUE not", self._set),
            "/stats": ("tokens and times of the answers", self._stats),
            "/save": ("FILE: write the conversation as the body of a request", self._save),
            "/clear": ("begin a new conversation with the same settings", self._clear),
            "/help": ("this list", self._help),
            "/exit": ("end, as Ctrl-D does", self._exit),
        }

    def run(self) -> None:
        """Until Ctrl-D or /exit. Ctrl-C stops an answer or drops a line, never the shell."""
        self._screen.note(f"{self._client.model} at {self._client.url}")
        self._screen.note(_KEYS)
        with contextlib.suppress(EOFError):
            while True:
                with contextlib.suppress(KeyboardInterrupt):
                    text = self._session.prompt("> ")
                    # The prompt has switched this off. The lines of a paste stay one message.
                    self._screen.control(_MARK_PASTES)
                    self._take(text)
        self._screen.control(_MARK_NO_PASTES)

    def _take(self, text: str) -> None:
        """Run a command or ask a question."""
        if not text.startswith("/"):
            if text.strip():
                self._ask(text)
            return
        name, _, rest = text.strip().partition(" ")
        if name not in self._commands:
            self._screen.note(
                f"there is no {name}: /help lists the commands; a message may begin with a space"
            )
            return
        self._commands[name][1](rest.strip())

    def _ask(self, text: str) -> None:
        """Show the answer. What was stopped stays in the conversation, a failure does not."""
        turns, answer, end = self._conversation.turns, Answer(), ""
        turns.append({"role": "user", "content": text})
        try:
            self._screen.show(self._client, self._conversation, answer)
        except KeyboardInterrupt:
            end = "stopped"
        except ChatError as error:
            end = error.message
        self._screen.end_line()
        if answer.text:
            turns.append({"role": "assistant", "content": answer.text})
            self._answers.append(answer)
        else:
            turns.pop()
        if figures := ", ".join(filter(None, (end, answer.describe()))):
            self._screen.note(figures)

    def _system(self, text: str) -> None:
        self._conversation.system = text
        self._screen.note("the system prompt is set" if text else "there is no system prompt")

    def _set(self, text: str) -> None:
        settings = self._conversation.settings
        name, _, value = text.partition(" ")
        if name and value:
            settings[name] = parse_value(value.strip())
        elif name:
            settings.pop(name, None)
        shown = ", ".join(f"{name} {json.dumps(value)}" for name, value in settings.items())
        self._screen.note(shown or "nothing is set; for example: /set temperature 0.2")

    def _stats(self, _: str) -> None:
        table = Table("answer", "prompt", "cached", "output", "first token", "tokens/s", box=None)
        for number, answer in enumerate(self._answers, 1):
            table.add_row(str(number), *figures(answer))
        self._screen.console.print(table if self._answers else "there are no answers yet")

    def _save(self, text: str) -> None:
        if not text:
            self._screen.note("the name of a file is missing: /save chat.json")
            return
        body = {"model": self._client.model, "messages": self._conversation.messages}
        body |= self._conversation.settings
        path = Path(text)
        try:
            path = path.expanduser().absolute()
            with path.open("w" if path in self._saved else "x") as file:
                json.dump(body, file, indent=2, ensure_ascii=False)
        except FileExistsError:
            self._screen.note(f"{path} exists and is left as it is; choose another name", "red")
        except (OSError, RuntimeError, ValueError) as error:  # such as ~NOBODY, or a lone surrogate
            reason = error.strerror if isinstance(error, OSError) else error
            self._screen.note(f"{path} cannot be written: {reason}", "red")
        else:
            self._saved.add(path)
            self._screen.note(f"saved as {path}; /v1/chat/completions takes it as a request")

    def _clear(self, _: str) -> None:
        self._conversation.turns.clear()
        self._screen.note("a new conversation")

    def _help(self, _: str) -> None:
        for name, (text, _action) in self._commands.items():
            self._screen.note(f"{name:<8} {text}", "none")

    def _exit(self, _: str) -> None:
        raise EOFError


def parse_value(text: str) -> Any:
    """JSON, or else the text itself, so that strings need no quotes."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def figures(answer: Answer) -> Iterator[str]:
    """Cells of /stats; a server need not report its tokens."""
    usage = answer.usage
    output, decode_s = usage.get("completion_tokens"), answer.total_s - (answer.first_s or 0.0)
    yield str(usage.get("prompt_tokens", "-"))
    yield str(answer.cached_tokens if usage else "-")
    yield str("-" if output is None else output)
    yield "-" if answer.first_s is None else f"{answer.first_s:.2f} s"
    yield f"{(output - 1) / decode_s:.1f}" if output and output > 1 and decode_s > 0 else "-"


@contextlib.contextmanager
def keys_kept() -> Iterator[None]:
    """Keep what is typed or pasted outside of prompts, unseen, for the next one.

    SIGTERM raises SystemExit meanwhile, so that the terminal shows again what is typed.
    """
    try:
        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
    except (OSError, ValueError, termios.error):
        yield
        return
    quiet = termios.tcgetattr(fd)
    quiet[0] &= ~termios.ICRNL  # Enter is not Ctrl-J
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    quiet[3] |= termios.ISIG | termios.NOFLSH
    handler = signal.signal(signal.SIGTERM, _exit)
    termios.tcsetattr(fd, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)
        signal.signal(signal.SIGTERM, handler)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _history() -> History:
    """In the user's cache, readable by the user only."""
    folder = user_cache()
    if folder is None:
        return InMemoryHistory()
    path = folder / "chat_history"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def _keys() -> KeyBindings:
    """Enter sends; Alt-Enter begins a line, as Ctrl-J does where it differs from Enter."""
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
