"""Hostile inputs of every kind, beside streams that must not notice."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

from minisrv.checkpoint.hub import DEMO_DIR
from tests.soak.fuzz import FuzzReport, run_fuzz
from tests.soak.good_streams import NUM_STREAMS
from tests.soak.hostile import Hostile
from tests.soak.hostile_bodies import hostile_body, hostile_template, hostile_text, large_body
from tests.soak.hostile_grammars import hostile_grammar
from tests.soak.hostile_http import hostile_request
from tests.soak.openapi_cases import openapi_cases
from tests.soak.scale import SEED, scaled
from tests.support.server_process import ROOT, ServerProcess, environment, running, wait_until

# Together 20,000 inputs, also if the description gives fewer than 3,000 cases. No more grammars
# than this: each may take seconds.
NUM_INPUTS = {
    "openapi": 3000,
    "body": 8200,
    "http": 4400,
    "text": 2200,
    "template": 2140,
    "large": 60,
}
NUM_GRAMMARS = 200
NUM_CONNECTIONS = 12
LONGEST_WAIT_S = 60


def make_inputs(
    document: dict[str, Any], scale: float, num_grammars: int
) -> tuple[int, Iterator[Hostile]]:
    """Inputs of every kind, shuffled, and their number; the same for the same seed."""
    rng = random.Random(SEED)
    names = field_names(document)
    makers: dict[str, Callable[[], Hostile]] = {
        "body": lambda: hostile_body(rng, names),
        "http": lambda: hostile_request(rng),
        "text": lambda: hostile_text(rng),
        "template": lambda: hostile_template(rng),
        "large": lambda: large_body(rng),
        "grammar": lambda: hostile_grammar(rng),
    }
    counts = {kind: round(count * scale) for kind, count in NUM_INPUTS.items()}
    openapi = openapi_cases(document, counts.pop("openapi"), SEED)
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    kinds += ["grammar"] * num_grammars + ["openapi"] * len(openapi)
    rng.shuffle(kinds)
    makers["openapi"] = openapi.pop
    return len(kinds), (makers[kind]() for kind in kinds)


def field_names(document: dict[str, Any]) -> list[str]:
    """Of all bodies that the server describes."""
    names: set[str] = set()
    for item in document["paths"].values():
        for operation in item.values():
            content = operation.get("requestBody", {}).get("content", {})
            names |= (
                content.get("application/json", {}).get("schema", {}).get("properties", {}).keys()
            )
    return sorted(names)


@contextlib.contextmanager
def good_streams(server: ServerProcess) -> Iterator[dict[str, Any]]:
    """Streams while the block runs; afterwards the dictionary has what they saw."""
    seen: dict[str, Any] = {}
    streaming = subprocess.Popen(
        [sys.executable, "-m", "tests.soak.good_streams", server.url, str(DEMO_DIR)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    try:
        yield seen
        output, _ = streaming.communicate(timeout=LONGEST_WAIT_S)
        seen |= json.loads(output)
    finally:
        streaming.kill()
        streaming.wait()


def fuzz(socket_dir: Path, scale: float, num_grammars: int) -> None:
    options = ("--model", "demo", "--max-seq-len", "2048", "--max-open-requests", "64")
    with running(*options, tmp_dir=socket_dir, grammars=True) as server:
        document = httpx.get(f"{server.url}/openapi.json").json()
        num_inputs, inputs = make_inputs(document, scale, num_grammars)
        host, port = server.url.removeprefix("http://").split(":")
        with good_streams(server) as seen:
            report = uvloop.run(run_fuzz((host, int(port)), inputs, NUM_CONNECTIONS))
        print(report)
        print(json.dumps(seen))
        check(server, report, seen, num_inputs)


def check(server: ServerProcess, report: FuzzReport, seen: dict[str, Any], num_inputs: int) -> None:
    assert report.num_inputs == num_inputs
    assert report.faults == []
    assert seen["differences"] == []
    assert seen["num_streams"] >= NUM_STREAMS
    assert "Traceback" not in server.output
    assert " ERROR " not in server.output
    wait_until(lambda: num_open(server) == 0, LONGEST_WAIT_S)


def num_open(server: ServerProcess) -> int:
    (load,) = httpx.get(f"{server.url}/v1/loads").json()["loads"]
    return int(load["num_open_reqs"])


@pytest.mark.timed
def test_some_hostile_inputs_are_refused_and_disturb_nobody(socket_dir: Path) -> None:
    fuzz(socket_dir, scale=0.01, num_grammars=6)


@pytest.mark.soak
def test_many_hostile_inputs_are_refused_and_disturb_nobody(socket_dir: Path) -> None:
    fuzz(
        socket_dir, scale=scaled(1000) / 1000, num_grammars=min(NUM_GRAMMARS, scaled(NUM_GRAMMARS))
    )
