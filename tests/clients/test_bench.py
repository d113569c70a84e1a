"""`minisrv bench` and guidellm measure the same of a server that paces its tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minisrv.commands import bench
from tests.clients.running import Machine
from tests.support.paced_server import paced_server

FIRST_S, GAP_S = 0.2, 0.02
REQUESTS, STREAMS, TOKENS = 40, 4, 50
GUIDELLM = """
guidellm run --backend kind=openai_http,target={url} \\
  --profile kind=concurrent,streams={streams} --constraint kind=max_requests,count={requests} \\
  --data kind=json_file,path=prompts.jsonl --output kind=json,path=results.json
"""


@pytest.mark.client("guidellm", "the figures of `minisrv bench` within 5%")
def test_guidellm_measures_the_same(machine: Callable[[str], Machine], tmp_path: Path) -> None:
    with paced_server(FIRST_S, GAP_S) as server:
        theirs = measured_by_guidellm(machine("guidellm"), server.url)
        ours = measured_by_bench(server.url, tmp_path / "result.json")
    print(json.dumps({name: [ours[name], theirs[name]] for name in ours}))
    assert ours == pytest.approx(theirs, rel=0.05)


def measured_by_guidellm(guidellm: Machine, url: str) -> dict[str, float]:
    prompts = [{"prompt": f"word {i}", "output_tokens_count": TOKENS} for i in range(REQUESTS)]
    lines = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    (guidellm.work / "prompts.jsonl").write_text(lines)
    done = guidellm.program(GUIDELLM.format(url=url, streams=STREAMS, requests=REQUESTS), "sh")
    assert done.status == 0, str(done)
    results: Any = json.loads((guidellm.work / "results.json").read_text())
    metrics = results["benchmarks"][0]["metrics"]
    found = {k: v["successful"] for k, v in metrics.items() if "successful" in (v or {})}
    assert found["request_latency"]["count"] == REQUESTS
    return {
        "TTFT, median": found["time_to_first_token_ms"]["median"] / 1000,
        "time per token, mean": found["inter_token_latency_ms"]["mean"] / 1000,
        "E2E, median": found["request_latency"]["median"],
        "E2E, mean": found["request_latency"]["mean"],
        "output tokens/s": found["output_tokens_per_second"]["mean"],
        "requests/s": found["requests_per_second"]["mean"],
    }


def measured_by_bench(url: str, path: Path) -> dict[str, float]:
    load = ["--requests", str(REQUESTS), "--concurrency", str(STREAMS), "--endpoint", "chat"]
    load += ["--input-tokens", "10", "--output-tokens", str(TOKENS)]
    assert bench.main(["--url", url, *load, "--output", str(path)]) == 0
    (point,) = json.loads(path.read_text())["points"]
    return {
        "TTFT, median": point["latencies"]["ttft"]["p50"],
        "time per token, mean": point["latencies"]["tpot"]["mean"],
        "E2E, median": point["latencies"]["e2e"]["p50"],
        "E2E, mean": point["latencies"]["e2e"]["mean"],
        "output tokens/s": point["rates"]["output_tokens"],
        "requests/s": point["rates"]["requests"],
    }
