"""`minisrv launch CLIENT`: a coding agent set up for a running server.

Everything is passed by environment variables and flags, and for qwen-code by a file of defaults in
minisrv's cache; the user's own configuration is neither read nor written.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import urllib.error
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from minisrv.command_line import split_at_dashes
from minisrv.config import ENV_PREFIX, ServerConfig
from minisrv.errors import ConfigError, MinisrvError
from minisrv.option_values import authorization, read_server_url
from minisrv.server_request import UnreachableError, send_request
from minisrv.user_cache import user_cache

NO_KEY = "none"  # clients insist on a key
# Agents begin with prompts of thousands of tokens; they get at least three quarters of the context.
OUTPUT_SHARE = 4
MAX_OUTPUT_TOKENS = 32_000
SMALL_CONTEXT = 32_768
TIMEOUT_S = 10


@dataclass(frozen=True, slots=True)
class Served:
    """What a server says of itself: its URL without /v1, a model's name, tokens of its context."""

    url: str
    model: str
    max_seq_len: int
    api_key: str = NO_KEY

    @property
    def max_output_tokens(self) -> int:
        """How many tokens clients may ask for in one reply."""
        return min(MAX_OUTPUT_TOKENS, max(1, self.max_seq_len // OUTPUT_SHARE))


@dataclass(frozen=True, slots=True)
class Launch:
    """A command and the environment variables that it needs besides the user's own."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """A line for a POSIX shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " \\\n  ".join(["env", *variables, shlex.join(self.command)])


@dataclass(frozen=True, slots=True)
class Client:
    """name: as users know it. package: what npm installs it from."""

    name: str
    package: str
    prepare: Callable[[Served], Launch]


def prepare_codex(served: Served) -> Launch:
    """Codex: it speaks Responses only, and sends no limit of its own."""
    provider = {
        "name": "minisrv",
        "base_url": f"{served.url}/v1",
        "env_key": "MINISRV_CLIENT_KEY",
        "wire_api": "responses",
    }
    settings: dict[str, Any] = {
        "model": served.model,
        "model_provider": "minisrv",
        **{f"model_providers.minisrv.{name}": value for name, value in provider.items()},
        "model_context_window": served.max_seq_len,
        "model_auto_compact_token_limit": served.max_seq_len - served.max_output_tokens,
        "web_search": "disabled",
    }
    # A TOML value is a JSON value here.
    flags = [part for name, value in settings.items() for part in _setting(name, value)]
    return Launch(["codex", *flags], {"MINISRV_CLIENT_KEY": served.api_key})


def _setting(name: str, value: Any) -> tuple[str, str]:
    return "-c", f"{name}={json.dumps(value)}"


def prepare_opencode(served: Served) -> Launch:
    """opencode: its configuration is merged from several places, one of them a variable."""
    limit = {"context": served.max_seq_len, "output": served.max_output_tokens}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "minisrv",
        "options": {"baseURL": f"{served.url}/v1", "apiKey": served.api_key},
        "models": {served.model: {"name": served.model, "limit": limit}},
    }
    model = f"minisrv/{served.model}"
    config = {"provider": {"minisrv": provider}, "model": model, "small_model": model}
    return Launch(["opencode"], {"OPENCODE_CONFIG_CONTENT": json.dumps(config)})


def prepare_qwen_code(served: Served) -> Launch:
    """qwen-code, which reads the size of the context only from a file of defaults."""
    defaults = {"model": {"generationConfig": {"contextWindowSize": served.max_seq_len}}}
    flags = ["--auth-type", "openai", "--model", served.model]
    environment = {
        "OPENAI_BASE_URL": f"{served.url}/v1",
        "OPENAI_API_KEY": served.api_key,
        "QWEN_CODE_MAX_OUTPUT_TOKENS": str(served.max_output_tokens),
        "QWEN_CODE_SYSTEM_DEFAULTS_PATH": str(_write("qwen-code.json", defaults)),
    }
    return Launch(["qwen", *flags], environment)


def prepare_claude(served: Served) -> Launch:
    """Claude Code: it asks several models, all of which are the served one here.

    Its search for tools would need a server that shows the model some of the tools only later.
    """
    environment = {
        "ANTHROPIC_BASE_URL": served.url,
        "ANTHROPIC_AUTH_TOKEN": served.api_key,
        "ANTHROPIC_MODEL": served.model,
        "ANTHROPIC_DEFAULT_OPUS_MODEL": served.model,
        "ANTHROPIC_DEFAULT_SONNET_MODEL": served.model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": served.model,
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(served.max_output_tokens),
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(served.max_seq_len),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "ENABLE_TOOL_SEARCH": "false",
    }
    return Launch(["claude"], environment)


CLIENTS = {
    "codex": Client("Codex", "@openai/codex", prepare_codex),
    "opencode": Client("opencode", "opencode-ai", prepare_opencode),
    "qwen-code": Client("qwen-code", "@qwen-code/qwen-code", prepare_qwen_code),
    "claude": Client("Claude Code", "@anthropic-ai/claude-code", prepare_claude),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print or run the command; exit status 1: no server or client, 2: a wrong option."""
    own, passed_on = split_at_dashes(sys.argv[1:] if argv is None else argv)
    options = make_parser().parse_args(own)
    client = CLIENTS[options.client]
    try:
        config = ServerConfig.from_environment(model="demo")
        key = options.api_key or next(iter(config.api_key), NO_KEY)
        url = read_server_url(options.url or f"http://127.0.0.1:{config.port}").removesuffix("/v1")
        served = ask(url, key, options.model)
        launch = client.prepare(served)
    except MinisrvError as error:
        print(f"minisrv: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    launch.command.extend(passed_on)
    print(describe(client, served), file=sys.stderr)
    if options.run:
        return run(client, launch)
    print(launch)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command itself."""
    parser = argparse.ArgumentParser(
        prog="minisrv launch",
        usage="minisrv launch CLIENT [options] [-- arguments of the client]",
        description="Print the command that starts a coding agent with a running server.",
        epilog="Configuration files of the client are not changed.",
    )
    parser.add_argument("--run", action="store_true", help="start the client")
    parser.add_argument(
        "--url", help="of the server (default: http://127.0.0.1:8000, or the port in MINISRV_PORT)"
    )
    parser.add_argument("--model", help="one of the served names (default: the first)")
    parser.add_argument("--api-key", help="default: the first in MINISRV_API_KEY")
    parser.add_argument("client", choices=CLIENTS, metavar="CLIENT", help=", ".join(CLIENTS))
    return parser


def ask(url: str, api_key: str, name: str | None = None) -> Served:
    """Read the served names and the context from /v1/models. Raises MinisrvError."""
    headers = authorization("" if api_key == NO_KEY else api_key)
    try:
        with send_request(f"{url}/v1/models", headers, timeout_s=TIMEOUT_S) as response:
            models = {str(m["id"]): int(m["max_model_len"]) for m in json.load(response)["data"]}
        if not models:
            raise ValueError("it names no model")
    except urllib.error.HTTPError as error:
        raise MinisrvError(_explain(url, error)) from None
    except (
        *(UnreachableError, HTTPException, OSError),
        *(ValueError, LookupError, TypeError, RecursionError),
    ) as error:
        raise MinisrvError(
            f"no minisrv answers at {url} ({error}); "
            "start one with `minisrv serve MODEL`, or give its --url"
        ) from None
    model = name or next(iter(models))
    if model not in models:
        raise ConfigError(f"--model is {model}; {url} serves {', '.join(models)}")
    return Served(url, model, models[model], api_key)


def _explain(url: str, error: urllib.error.HTTPError) -> str:
    """A refusal of the server, with what can be done about it."""
    if error.code in (401, 403):
        return f"{url} needs a key: give --api-key or set {ENV_PREFIX}API_KEY"
    if error.code == 503:
        return f"{url} does not serve yet; {url}/ready reports its progress"
    return f"{url}/v1/models answers with status {error.code}; is it a minisrv?"


def describe(client: Client, served: Served) -> str:
    """One or two lines about what was found."""
    text = (
        f"{client.name} with {served.model} at {served.url}: context {served.max_seq_len} tokens, "
        f"of which a reply may take {served.max_output_tokens}"
    )
    if served.max_seq_len < SMALL_CONTEXT:
        text += (
            f"\nThis context is short for a coding agent; {SMALL_CONTEXT} tokens or more are "
            "advisable (--max-seq-len of the server, as far as the model has it)"
        )
    return text


def run(client: Client, launch: Launch) -> int:
    """Replace this process by the client; returns only if it is not installed."""
    program = shutil.which(launch.command[0])
    if program is None:
        print(
            f"minisrv: {launch.command[0]} is not on the PATH; install {client.name} with "
            f"`npm install -g {client.package}`",
            file=sys.stderr,
        )
        return 1
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(program, launch.command, {**os.environ, **launch.environment})


def _write(name: str, content: Any) -> Path:
    """A file of ours in the user's cache. Raises MinisrvError."""
    cache = user_cache()
    if cache is None:
        raise MinisrvError("the user's cache cannot be written; set XDG_CACHE_HOME to a folder")
    path = cache / "launch" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path
