"""Measure how long the steps of a running server take, through its own API and metrics.

Prompts of several lengths give the time of prefill, one at a time. Requests with several choices
give the time between tokens at several batch sizes and lengths of context. The server should have
nothing else to do.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import time
import urllib.error
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any

from minisrv.config import MAX_PREFILL_TOKENS
from minisrv.errors import MinisrvError
from minisrv.option_values import authorization, read_server_url
from minisrv.sampling_params import MAX_CHOICES
from minisrv.server_request import UnreachableError, send_request
from minisrv.simulation.linear import Calibration, Observation, fit
from minisrv.simulation.replica import ServerShape

OUTPUT_TOKENS = 48
_REPETITIONS = 3
_TIMEOUT_S, _SETTLED_S = 600.0, 5.0
_PREFILL, _GAP = "request_prefill_time_seconds", "inter_token_latency_seconds"
_QUEUE = "request_queue_time_seconds"


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

    def complete(self, prompt_tokens: int, output_tokens: int, choices: int = 1) -> float:
        """Stream an answer to a prompt of random tokens; returns the seconds to its first data."""
        ids = range(min(100, self.info["vocab_size"] // 2), self.info["vocab_size"] - 1)
        body = {
            "prompt": self._random.choices(ids, k=prompt_tokens),
            "max_tokens": output_tokens,
            "n": choices,
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
    """Measure a server and fit its times. `say` gets a line for each measurement.

    Raises CalibrationError; ConfigError for a URL or key that cannot be used.
    """
    try:
        return _calibrate(url, api_key, say)
    except (HTTPException, OSError) as error:
        raise CalibrationError(f"{url} broke off an answer: {error}") from None
    except (LookupError, TypeError, json.JSONDecodeError) as error:
        raise CalibrationError(f"{url} does not answer as a minisrv: {error!r}") from None


def _calibrate(url: str, api_key: str, say: Callable[[str], None]) -> Calibration:
    server = RunningServer(url, api_key)
    server.complete(1, 1)
    shape = _shape(server)
    largest = min(shape.max_seq_len, shape.num_pages * shape.page_size) - OUTPUT_TOKENS
    observations, overheads = list[Observation](), list[float]()
    for tokens in _prompt_lengths(shape, largest):
        observation, overhead_s = _measure_prompt(server, shape, tokens)
        observations.append(observation)
        overheads.append(overhead_s)
        say(f"prompt of {tokens} tokens: {observation.seconds * 1e3:.2f} ms")
    for choices, tokens in _batches(shape, largest):
        observations.append(_measure_decodes(server, choices, tokens))
        say(f"{choices} x {tokens} tokens: {observations[-1].seconds * 1e3:.2f} ms per step")
    request_s = max(0.0, statistics.median(overheads)) / 2
    values = {name: getattr(shape, name) for name in ServerShape.__slots__}
    shape = ServerShape(**{**values, "request_s": request_s})
    return Calibration(server.info["model"], shape, fit(observations), observations)


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
    """Choices and context, as far as the cache has room."""
    room = shape.num_pages * shape.page_size - shape.page_size
    contexts = sorted({min(32, largest), *(min(n, largest) for n in (512, 2048, 8192))})
    most = min(shape.max_running_requests, MAX_CHOICES)
    sizes = [size for size in (1, 4, 16, 64) if size <= most]
    return [
        (size, context)
        for context in contexts
        for size in sizes
        if context + size * (OUTPUT_TOKENS + shape.page_size) <= room
    ]


def _measure_prompt(
    server: RunningServer, shape: ServerShape, tokens: int
) -> tuple[Observation, float]:
    """The steps of a prompt, and the seconds to its first token that are not of the scheduler."""
    seconds, overheads = list[float](), list[float]()
    for _ in range(_REPETITIONS):
        before = server.metrics()
        ttft = server.complete(tokens, 1)
        change = _changes(server, before, _PREFILL)
        seconds.append(change[f"{_PREFILL}_sum"])
        overheads.append(ttft - change[f"{_PREFILL}_sum"] - change[f"{_QUEUE}_sum"])
    steps = -(-tokens // shape.max_prefill_tokens)
    pairs = tokens * (tokens + 1) / 2
    observation = Observation(steps, tokens, pairs, 0, 0, statistics.median(seconds))
    return observation, statistics.median(overheads)


def _measure_decodes(server: RunningServer, choices: int, tokens: int) -> Observation:
    """The mean step while all choices of a request decode."""
    seconds = []
    for _ in range(_REPETITIONS):
        before = server.metrics()
        server.complete(tokens, OUTPUT_TOKENS, choices)
        change = _changes(server, before, _GAP)
        seconds.append(change[f"{_GAP}_sum"] / change[f"{_GAP}_count"])
    context = choices * (tokens + OUTPUT_TOKENS / 2)
    return Observation(1, 0, 0, choices, context, statistics.median(seconds))


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
