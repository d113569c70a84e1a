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
from typing import Any

import uvloop

from minisrv.bench.client import Client, Sampling
from minisrv.bench.compare import compare, read_result
from minisrv.bench.load import Load, make_load, parse_loads
from minisrv.bench.measures import Bounds, Json, request_rows, summarize
from minisrv.bench.plots import check_plot, plot
from minisrv.bench.prepare import choose_prompts, read_tokenizer
from minisrv.bench.progress import Progress
from minisrv.bench.prompts import Prompts
from minisrv.bench.report import describe_point, describe_sweep, load_name
from minisrv.bench.runner import run
from minisrv.commands.bench_options import make_parser, read_field, read_source
from minisrv.errors import ConfigError, MinisrvError
from minisrv.option_values import check_output


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; exit status 1: a request failed, 2: a wrong option, 130: Ctrl-C."""
    options = make_parser().parse_args(argv)
    try:
        if options.compare is not None:
            print(compare(*map(read_result, options.compare)))
            return 0
        return uvloop.run(_Bench(options).measure())
    except MinisrvError as error:
        print(f"minisrv: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:  # before or between the measurements
        return 130
    except BrokenPipeError:
        raise  # nobody reads the output
    except OSError as error:
        print(f"minisrv: {error}", file=sys.stderr)
        return 1


class _Bench:
    """One call of the command. Raises ConfigError for wrong options."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._loads = parse_loads(
            options.concurrency, options.rate, options.arrivals, options.trace is not None
        )
        self._bounds = Bounds.parse(options.goodput)
        self._source = read_source(options)
        for path in (options.output, options.plot):
            check_output(path)
        if options.plot is not None:
            check_plot(options.plot)
        self._tokenizer = read_tokenizer(options.tokenizer) if options.tokenizer else None
        self._client = Client(
            options.url,
            options.model,
            api_key=options.api_key or os.environ.get("OPENAI_API_KEY", ""),
            endpoint=options.endpoint,
            sampling=Sampling(
                options.temperature, not options.use_eos, dict(map(read_field, options.field))
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
            if self._options.output is not None:
                self._options.output.write_text(json.dumps(result, default=str) + "\n")
            print(describe_point(point), flush=True)
            if point["interrupted"]:
                break
        if len(result["points"]) > 1:
            print(describe_sweep(result["points"]))
        if self._options.plot is not None:
            plot(result, self._options.plot)
        return _status(result["points"])

    async def _measure_point(self, prompts: Prompts, load: Load, seed: tuple[int, ...]) -> Json:
        conversations = make_load(load, self._source, self._options.requests, seed)
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
        hidden = ("api_key", "output", "plot", "compare")
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


def _status(points: Sequence[Json]) -> int:
    if any(point["interrupted"] for point in points):
        return 130
    return int(any(point["requests"]["failed"] for point in points))


if __name__ == "__main__":
    sys.exit(main())
