"""Measure how long the steps of a running server take, through its own API and metrics.

Prompts of several lengths give the time of prefill, one at a time. Several prompts at once, which
are in the cache already, give the time between tokens at several batch sizes and lengths of
context. They differ from each other, since pages that they shared would be read from memory only
once. All is measured in several rounds, so that what disturbs the server for a while does not
disturb all samples of one measurement. The server should have nothing else to do.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import time
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from typing import Any

from minisrv.config import MAX_PREFILL_TOKENS
from minisrv.errors import MinisrvError
from minisrv.option_values import authorization, read_server_url
from minisrv.server_request import UnreachableError, send_request
from minisrv.simulation.linear import Calibration, Observation, fit
from minisrv.simulation.replica import ServerShape

OUTPUT_TOKENS = 32
_ROUNDS = 5
_MOST_STEPS = 32  # of full size, to bring the prompts of a batch into the cache
_TIMEOUT_S, _SETTLED_S = 600.0, 5.0
_PREFILL, _GAP = "request_prefill_time_seconds", "inter_token_latency_seconds"
_QUEUE = "request_queue_time_seconds"

Samples = dict[tuple[int, int], list[float]]  # seconds by the number of prompts and their length


class CalibrationError(MinisrvError):
    """The server cannot be reached, refuses, or reports nothing."""


class RunningServer:
    """The server at `url`; calls raise CalibrationError."""

    def __init__(self, url: str, api_key: str = "") -> None:
        self._url = read_server_url(url)
        self._headers = authorization(api_key)
        self._random = random.Random(time.time_ns())  # no prompt is in the cache from before
        self.info = json.loads(self._read("/server_info"))

    def metrics(self) -> dict[str, float]:
        """The metrics, summed over their labels, by name without prefix."""
        values: dict[str, float] = {}
        for line in self._read("/metrics").decode().splitlines():
            found = re.match(r"minisrv:(\w+)(?:\{.*\})? (\S+)$", line)
            if found is not None:
                values[found[1]] = values.get(found[1], 0.0) + float(found[2])
        return values

    def num_pages(self) -> int:
        """Of the cache; waits for the scheduler's first figures, which follow the first request."""
        deadline = time.monotonic() + _SETTLED_S
        while time.monotonic() < deadline:
            found = re.search(r'num_gpu_blocks="(\d+)"', self._read("/metrics").decode())
            if found is not None:
                return int(found[1])
            time.sleep(0.02)
        raise CalibrationError(f"{self._url}/metrics reports no cache; is it a minisrv?")

    def new_prompt(self, tokens: int) -> list[int]:
        """Random tokens."""
        ids = range(min(100, self.info["vocab_size"] // 2), self.info["vocab_size"] - 1)
        return self._random.choices(ids, k=tokens)

    def complete(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> float:
        """Stream the answers to prompts; returns the seconds to the first data."""
        body = {
            "prompt": prompts,
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "stream": True,
            "temperature": 1.0,
        }
        began = time.perf_counter()
        with self._open("/v1/completions", body) as response:
            response.readline()
            first = time.perf_counter() - began
            response.read()
        return first

    def _read(self, path: str) -> bytes:
        with self._open(path, None) as response:
            content: bytes = response.read()
        return content

    def _open(self, path: str, body: Mapping[str, Any] | None) -> Any:
        try:
            return send_request(self._url + path, self._headers, body, timeout_s=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                text = error.read(1000).decode(errors="replace")
            raise CalibrationError(f"{self._url}{path} answers {error.code}: {text}") from None
        except UnreachableError as error:
            raise CalibrationError(f"{self._url} cannot be reached: {error.message}") from None


def calibrate(url: str, api_key: str, say: Callable[[str], None]) -> Calibration:
    """Measure a server and fit its times. `say` gets a line for each round and measurement.

    Raises CalibrationError; ConfigError for a URL or key that cannot be used.
    """
    try:
        return _calibrate(url, api_key, say)
    except (HTTPException, OSError) as error:
        raise CalibrationError(f"{url} broke off an answer: {error}") from None
    except (LookupError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{url} does not answer as a minisrv: {error!r}") from None


def _calibrate(url: str, api_key: str, say: Callable[[str], None]) -> Calibration:
    server = RunningServer(url, api_key)
    if not server.info["config"]["radix_cache"]:
        raise CalibrationError(
            f"{url} runs with --no-radix-cache: its steps would mix prompts and decodes; "
            "calibrate it with its cache, and simulate it with --no-radix-cache"
        )
    server.complete([server.new_prompt(1)], 1)
    shape = _shape(server)
    largest = min(shape.max_seq_len, shape.num_pages * shape.page_size) - OUTPUT_TOKENS
    lengths, batches = _prompt_lengths(shape, largest), _batches(shape, largest)
    longest = max(context for _, context in batches)
    prompts = [server.new_prompt(longest) for _ in range(max(size for size, _ in batches))]
    prefills, decodes, overheads = Samples(), Samples(), list[float]()
    for number in range(_ROUNDS):
        say(f"round {number + 1} of {_ROUNDS}")
        for tokens in lengths:
            seconds, overhead_s = _measure_prompt(server, tokens)
            prefills.setdefault((1, tokens), []).append(seconds)
            overheads.append(overhead_s)
        for size, context in batches:
            seconds = _measure_decodes(server, [prompt[:context] for prompt in prompts[:size]])
            decodes.setdefault((size, context), []).append(seconds)
    observations = _prefill_observations(prefills, shape, say)
    observations += _decode_observations(decodes, say)
    values = {name: getattr(shape, name) for name in ServerShape.__slots__}
    values["request_s"] = max(0.0, statistics.median(overheads)) / 2
    measured = ServerShape(**values)
    return Calibration(server.info["model"], measured, fit(observations), observations)


def _shape(server: RunningServer) -> ServerShape:
    info, options = server.info, server.info["config"]
    cuda = " on cuda" in info["placement"]
    depth, budget = options["overlap_depth"], options["max_prefill_tokens"]
    return ServerShape(
        num_pages=server.num_pages(),
        page_size=options["page_size"],
        max_seq_len=info["max_model_len"],
        max_prefill_tokens=budget or MAX_PREFILL_TOKENS["cuda" if cuda else "cpu"],
        max_running_requests=options["max_running_requests"],
        overlap_depth=int(cuda) if depth is None else depth,
        radix_cache=options["radix_cache"],
        fair_keys=options["fair_keys"],
    )


def _prompt_lengths(shape: ServerShape, largest: int) -> list[int]:
    """From one token to four steps; the first of a step's size is where chunks begin."""
    budget = shape.max_prefill_tokens
    lengths = {1, 16, *(budget * part // 16 for part in (1, 2, 4, 8, 16, 32, 64))}
    return sorted({max(1, min(length, largest)) for length in lengths})


def _batches(shape: ServerShape, largest: int) -> list[tuple[int, int]]:
    """Prompts and their length, as far as the cache has room and they are there soon.

    A prompt is one token longer than whole pages, since that token is all that is not cached.
    """
    room = (shape.num_pages - 1) * shape.page_size
    soon = _MOST_STEPS * shape.max_prefill_tokens
    pages = (max(0, min(n, largest) - 1) // shape.page_size for n in (33, 513, 2049, 8193))
    contexts = sorted({count * shape.page_size + 1 for count in pages})
    sizes = [2**n for n in range(7) if 2**n <= shape.max_running_requests]
    return [
        (size, context)
        for context in contexts
        for size in sizes
        if size * context <= soon and size * (context + OUTPUT_TOKENS + shape.page_size) <= room
    ] or [(1, 1)]


def _measure_prompt(server: RunningServer, tokens: int) -> tuple[float, float]:
    """The seconds of a prompt's steps, and those to its first token outside the scheduler."""
    before = server.metrics()
    ttft = server.complete([server.new_prompt(tokens)], 1)
    change = _changes(server, before, _PREFILL)
    seconds = change[f"{_PREFILL}_sum"]
    return seconds, ttft - seconds - change[f"{_QUEUE}_sum"]


def _measure_decodes(server: RunningServer, prompts: Sequence[Sequence[int]]) -> float:
    """The mean seconds of a step while all prompts decode."""
    server.complete(prompts, 1)
    before = server.metrics()
    server.complete(prompts, OUTPUT_TOKENS)
    change = _changes(server, before, _GAP)
    return change[f"{_GAP}_sum"] / change[f"{_GAP}_count"]


def _prefill_observations(
    measured: Samples, shape: ServerShape, say: Callable[[str], None]
) -> list[Observation]:
    observations = []
    for (_, tokens), seconds in measured.items():
        steps, pairs = -(-tokens // shape.max_prefill_tokens), tokens * (tokens + 1) / 2
        middle = statistics.median(seconds)
        observations.append(Observation(steps, tokens, pairs, 0, 0, middle))
        say(f"prompt of {tokens} tokens: {_describe(seconds)}")
    return observations


def _decode_observations(measured: Samples, say: Callable[[str], None]) -> list[Observation]:
    observations = []
    for (size, tokens), seconds in measured.items():
        context = size * (tokens + OUTPUT_TOKENS / 2)
        observations.append(Observation(1, 0, 0, size, context, statistics.median(seconds)))
        say(f"{size} x {tokens} tokens: {_describe(seconds)} per step")
    return observations


def _describe(seconds: Sequence[float]) -> str:
    middle, least, most = (f(seconds) * 1e3 for f in (statistics.median, min, max))
    return f"{middle:.2f} ms ({least:.2f} to {most:.2f})"


def _changes(server: RunningServer, before: Mapping[str, float], name: str) -> dict[str, float]:
    """What the metrics have grown by, once the histogram `name` has the end of a request.

    The scheduler's own figures arrive up to half a second later than a request ends.
    """
    deadline = time.monotonic() + _SETTLED_S
    while time.monotonic() < deadline:
        now = server.metrics()
        if not now["num_requests_running"] and now[f"{name}_count"] > before[f"{name}_count"]:
            return {key: value - before.get(key, 0.0) for key, value in now.items()}
        time.sleep(0.02)
    raise CalibrationError(f"the server's metric {name} does not change")
