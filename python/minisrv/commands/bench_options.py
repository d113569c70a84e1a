"""The options of `minisrv bench`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from minisrv.bench.client import ENDPOINTS
from minisrv.bench.load import ARRIVALS
from minisrv.bench.measures import LATENCIES
from minisrv.bench.prepare import PROMPT_FORMS
from minisrv.bench.replay import Replay
from minisrv.bench.traces import DIVISORS, read_trace
from minisrv.bench.workloads import Range, Shape
from minisrv.errors import ConfigError
from minisrv.option_values import flag

# Tokens of the shared prefix and turns of a conversation, where the user gives none.
WORKLOADS = {"random": (0, "1"), "shared-prefix": (1024, "1"), "multi-turn": (0, "4")}
# Options that only make up a workload, and those that only change a trace.
_OF_WORKLOADS = (
    *("workload", "input_tokens", "output_tokens", "prefix_tokens", "prefixes", "turns"),
    "think_time",
)
_OF_TRACES = ("duration", "divide_lengths", "speed")


def make_parser() -> argparse.ArgumentParser:
    """All options."""
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
    _add_requests(parser.add_argument_group("the requests"))
    _add_load(parser.add_argument_group("the load"))
    add = parser.add_argument_group("the results").add_argument
    add(
        "--goodput",
        action="append",
        default=[],
        metavar="NAME:MS",
        help="count the requests within this bound, such as ttft:500; names: "
        f"{', '.join(LATENCIES)}",
    )
    add("--output", type=Path, metavar="FILE", help="write everything as JSON")
    add("--plot", type=Path, metavar="FILE", help="draw a picture: .png or .svg")
    add(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A.json", "B.json"),
        help="measure nothing; show two results of --output side by side",
    )
    return parser


def _add_requests(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--workload", choices=WORKLOADS, default="random", help="default: random")
    add("--input-tokens", default="256", metavar="N", help="N or LOW-HIGH (default: 256)")
    add("--output-tokens", default="128", metavar="N", help="N or LOW-HIGH (default: 128)")
    add(
        "--prefix-tokens",
        type=int,
        metavar="N",
        help="tokens that prompts share, before their own (default: 0; 1024 for shared-prefix)",
    )
    add("--prefixes", type=int, default=1, metavar="N", help="number of prefixes (default: 1)")
    add(
        "--turns",
        metavar="N",
        help="N or LOW-HIGH of a conversation (default: 1; 4 for multi-turn)",
    )
    add(
        "--think-time",
        type=float,
        default=0.0,
        metavar="S",
        help="mean pause before each further turn (default: 0)",
    )
    add("--trace", type=Path, metavar="FILE", help="replay a trace in place of a workload")
    add("--duration", type=float, metavar="S", help="only the first S seconds of the trace")
    add(
        "--divide-lengths",
        type=int,
        choices=DIVISORS,
        default=1,
        metavar="N",
        help="divide all lengths in the trace by N, a power of two",
    )
    add("--prompts", choices=PROMPT_FORMS, default="auto", help="default: ids where they work")
    add("--tokenizer", metavar="MODEL", help="for prompts of an exact length")
    add("--temperature", type=float, default=0.0, metavar="X", help="default: 0")
    add("--use-eos", action="store_true", help="let replies end before they have --output-tokens")
    add("--field", action="append", default=[], metavar="NAME=JSON", help="a field of the API")
    add("--seed", type=int, default=0, help="equal seeds send equal requests (default: 0)")


def _add_load(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--concurrency",
        metavar="N[,N...]",
        help="requests at once (default: 8, or as a trace has recorded them)",
    )
    add("--rate", metavar="X[,X...]", help="requests that begin per second")
    add("--arrivals", choices=ARRIVALS, default="poisson", help="of --rate (default: poisson)")
    add(
        "--speed",
        type=float,
        default=1.0,
        metavar="X",
        help="let requests of a trace arrive X times as fast (default: 1)",
    )
    add(
        "--requests",
        type=int,
        metavar="N",
        help="for each load (default: 8 x concurrency, "
        "at least 32; 100 with --rate; all of a trace)",
    )


def read_source(options: argparse.Namespace) -> Shape | Replay:
    """What is sent. Raises ConfigError."""
    _check_numbers(options)
    _check_used(options)
    if options.trace is not None:
        trace = read_trace(options.trace, options.requests)
        if options.duration is not None:
            trace = [request for request in trace if request.arrival_s < options.duration]
        if not trace:
            raise ConfigError("the trace has no requests in that --duration")
        return Replay(trace, options.speed, options.divide_lengths)
    prefix_tokens, turns = WORKLOADS[options.workload]
    return Shape(
        Range.parse(options.input_tokens),
        Range.parse(options.output_tokens),
        prefix_tokens if options.prefix_tokens is None else options.prefix_tokens,
        options.prefixes,
        Range.parse(options.turns or turns),
        options.think_time,
    )


def _check_numbers(options: argparse.Namespace) -> None:
    for name, low in (("requests", 1), ("prefix_tokens", 0), ("prefixes", 1), ("seed", 0)):
        if (value := getattr(options, name)) is not None and value < low:
            raise ConfigError(f"{flag(name)} must be at least {low}")
    for name in ("timeout", "speed"):
        if not getattr(options, name) > 0:
            raise ConfigError(f"{flag(name)} must be above 0")
    if not 0 <= options.think_time < math.inf:
        raise ConfigError("--think-time must be a number of seconds, at least 0")


def _check_used(options: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    traced = options.trace is not None
    why = "has no effect with --trace" if traced else "needs --trace"
    defaults = make_parser().parse_args([])
    for name in _OF_WORKLOADS if traced else _OF_TRACES:
        if getattr(options, name) != getattr(defaults, name):
            raise ConfigError(f"{flag(name)} {why}")
    if options.arrivals != defaults.arrivals and options.rate is None:
        raise ConfigError("--arrivals needs --rate")
    paced = options.rate is not None or options.concurrency is not None
    if paced and options.speed != defaults.speed:
        raise ConfigError("--speed has no effect with --rate or --concurrency")


def read_field(text: str) -> tuple[str, Any]:
    """Of "top_p=0.9"; a value that is not JSON is a string."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ConfigError(f"--field {text} is not of the form NAME=JSON, such as top_p=0.9")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value
