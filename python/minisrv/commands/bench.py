"""`minisrv bench`: measure a server with OpenAI's API under load (docs/bench.md)."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvloop

from minisrv.bench.client import ENDPOINTS, Client, Sampling
from minisrv.bench.load import ARRIVALS, Load, make_load, parse_loads
from minisrv.bench.measures import Bounds, Json, request_rows, summarize
from minisrv.bench.prepare import PROMPT_FORMS, choose_prompts, read_tokenizer
from minisrv.bench.progress import Progress
from minisrv.bench.prompts import Prompts
from minisrv.bench.report import describe_point, describe_sweep, load_name
from minisrv.bench.runner import run
from minisrv.bench.workloads import Range, Shape
from minisrv.errors import ConfigError, MinisrvError


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; exit status 1: a request failed, 2: a wrong option, 130: Ctrl-C."""
    options = _make_parser().parse_args(argv)
    try:
        return uvloop.run(_Bench(options).measure())
    except MinisrvError as error:
        print(f"minisrv: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        print(f"minisrv: {error}", file=sys.stderr)
        return 1


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minisrv bench",
        description="Measure a server with OpenAI's API under load. Ctrl-C ends with the figures "
        "of what was measured.",
    )
    add = parser.add_argument_group("the server").add_argument
    add("--url", default="http://127.0.0.1:8000", help="with or without /v1 (default: %(default)s)")
    add("--model", default="", help="default: the first that the server names")
    add("--api-key", help="default: OPENAI_API_KEY of the environment")
    add("--endpoint", choices=ENDPOINTS, default="completions", help="default: completions")
    add("--timeout", type=float, default=600.0, metavar="S", help="of a request (default: 600)")
    add = parser.add_argument_group("the requests").add_argument
    add("--input-tokens", default="256", metavar="N", help="N or LOW-HIGH (default: 256)")
    add("--output-tokens", default="128", metavar="N", help="N or LOW-HIGH (default: 128)")
    add("--prompts", choices=PROMPT_FORMS, default="auto", help="default: ids where they work")
    add("--tokenizer", metavar="MODEL", help="for prompts of an exact length")
    add("--temperature", type=float, default=0.0, metavar="X", help="default: 0")
    add("--use-eos", action="store_true", help="let replies end before --output-tokens")
    add("--field", action="append", default=[], metavar="NAME=JSON", help="a field of the API")
    add("--seed", type=int, default=0, help="equal seeds send equal requests (default: 0)")
    add = parser.add_argument_group("the load").add_argument
    add("--concurrency", metavar="N[,N...]", help="requests at once (default: 8)")
    add("--rate", metavar="X[,X...]", help="requests that begin per second")
    add("--arrivals", choices=ARRIVALS, default="poisson", help="of --rate (default: poisson)")
    add("--requests", type=int, metavar="N", help="for each load (default: 8 x concurrency, "
        "at least 32; 100 with --rate)")  # fmt: skip
    add = parser.add_argument_group("the results").add_argument
    add("--output", type=Path, metavar="FILE", help="write everything as JSON")
    return parser


class _Bench:
    """One call of the command. Raises ConfigError for wrong options."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._loads = parse_loads(options.concurrency, options.rate, options.arrivals)
        self._shape = Shape(Range.parse(options.input_tokens), Range.parse(options.output_tokens))
        self._bounds = Bounds({})
        if options.requests is not None and options.requests < 1:
            raise ConfigError("--requests must be at least 1")
        if options.seed < 0:
            raise ConfigError("--seed must be at least 0")
        self._tokenizer = read_tokenizer(options.tokenizer) if options.tokenizer else None
        self._client = Client(
            options.url,
            options.model,
            api_key=options.api_key or os.environ.get("OPENAI_API_KEY", ""),
            endpoint=options.endpoint,
            sampling=Sampling(
                options.temperature, not options.use_eos, dict(map(_read_field, options.field))
            ),
            timeout_s=options.timeout,
        )

    async def measure(self) -> int:
        """Measure all loads, one after another, and report; the exit status."""
        try:
            return await self._measure()
        finally:
            self._client.close()

    async def _measure(self) -> int:
        client = self._client
        client.model = client.model or await client.first_model()
        prompts, described = await choose_prompts(client, self._options.prompts, self._tokenizer)
        result = self._head(described)
        print(f"{client.url}, model {client.model}, {client.endpoint}; prompts: {described}\n")
        for number, load in enumerate(self._loads):
            point = await self._measure_point(prompts, load, (self._options.seed, number))
            result["points"].append(point)
            print(describe_point(point), flush=True)
            if point["interrupted"]:
                break
        if len(result["points"]) > 1:
            print(describe_sweep(result["points"]))
        if self._options.output is not None:
            self._options.output.write_text(json.dumps(result) + "\n")
        return _status(result["points"])

    async def _measure_point(self, prompts: Prompts, load: Load, seed: tuple[int, ...]) -> Json:
        conversations = make_load(load, self._shape, self._options.requests, seed)
        num_requests = sum(len(conversation.turns) for conversation in conversations)
        named = load.to_json()
        with Progress(load_name({"load": named}), num_requests) as progress:
            running = asyncio.ensure_future(
                run(self._client, prompts, conversations, load.concurrency, progress.report)
            )
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGINT, running.cancel)
            try:
                measured = await running
            finally:
                loop.remove_signal_handler(signal.SIGINT)
        figures = summarize(measured, self._bounds)
        return {"load": named, **figures, "each_request": request_rows(measured)}

    def _head(self, prompts: str) -> dict[str, Any]:
        hidden = ("api_key", "output")
        options = {k: v for k, v in vars(self._options).items() if k not in hidden}
        return {
            "tool": f"minisrv bench {version('minisrv')}",
            "python": platform.python_version(),
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": self._client.model,
            "prompts": prompts,
            "options": options,
            "points": [],
        }


def _read_field(text: str) -> tuple[str, Any]:
    """Of "top_p=0.9"; a value that is not JSON is a string."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ConfigError(f"--field {text} is not of the form NAME=JSON, such as top_p=0.9")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _status(points: Sequence[Json]) -> int:
    if any(point["interrupted"] for point in points):
        return 130
    return int(any(point["requests"]["failed"] for point in points))


if __name__ == "__main__":
    sys.exit(main())
