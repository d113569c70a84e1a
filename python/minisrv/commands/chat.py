"""`minisrv chat [MODEL|URL]`: a conversation with a model in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from minisrv.command_line import split_at_dashes
from minisrv.commands.chat_client import Answer, ChatClient
from minisrv.commands.chat_server import own_server
from minisrv.errors import ConfigError, MinisrvError

_URLS = ("http://", "https://")


def main(argv: Sequence[str] | None = None) -> int:
    """Talk, or answer once; exit status 1: it failed, 2: a wrong option, 130: Ctrl-C."""
    own, of_server = split_at_dashes(sys.argv[1:] if argv is None else argv)
    options = _make_parser().parse_args(own)
    try:
        return _run(options, of_server)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("prompt_toolkit", "rich"):
            raise
        print("minisrv: chat needs: pip install prompt-toolkit rich", file=sys.stderr)
    except MinisrvError as error:
        print(f"minisrv: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # As `| head` does it. Without this Python would report it once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minisrv chat",
        usage="minisrv chat [MODEL|URL] [options] [-- options of the server]",
        description="Talk to a model in the terminal. A server is started for a MODEL, and ended; "
        "a URL is that of any server with OpenAI's API.",
        epilog="What is piped in comes before the question: minisrv chat -q 'Sum it up' < FILE",
    )
    parser.add_argument(
        "target", nargs="?", default="demo", metavar="MODEL|URL", help="default: demo"
    )
    parser.add_argument("-q", "--question", metavar="TEXT", help="answer once and exit")
    parser.add_argument("--model", default="", help="with a URL: its model (default: the first)")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    parser.add_argument("--api-key", help="with a URL; default: OPENAI_API_KEY")
    return parser


def _run(options: argparse.Namespace, of_server: Sequence[str]) -> int:
    from rich.console import Console

    from minisrv.commands.chat_shell import Conversation, Screen, Shell, keys_kept

    piped = "" if sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8", "replace")
    question = "\n\n".join(filter(None, (piped.rstrip(), options.question)))
    if not question and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("there is no question; give one with -q or a pipe, or use a terminal")
    screen, conversation = Screen(Console(highlight=False)), Conversation(options.system)
    with keys_kept(), _connected(options, of_server) as client:
        if not question:
            Shell(client, conversation, screen).run()
            return 0
        conversation.turns.append({"role": "user", "content": question})
        try:
            screen.show(client, conversation, Answer())
        finally:
            screen.end_line()
    return 0


@contextlib.contextmanager
def _connected(options: argparse.Namespace, of_server: Sequence[str]) -> Iterator[ChatClient]:
    """A client of the given server, or of one that runs as long as the context."""
    if options.target.startswith(_URLS):
        if of_server:
            raise ConfigError(f"{' '.join(of_server)}: options of a server need a MODEL, not a URL")
        key = options.api_key or os.environ.get("OPENAI_API_KEY", "")
        yield ChatClient(options.target, key, options.model)
        return
    with _progress() as report, own_server(options.target, of_server, report) as (url, key):
        report("")
        yield ChatClient(url, key)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows the last line of a server's start on stderr, if that is a terminal, until it is ""."""
    from rich.console import Console
    from rich.text import Text

    status = Console(stderr=True, highlight=False).status("starting the server")

    def report(line: str) -> None:
        if line:
            status.update(Text(line))
        else:
            status.stop()

    with status:
        yield report


if __name__ == "__main__":
    sys.exit(main())
