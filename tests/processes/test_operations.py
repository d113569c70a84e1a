"""The routes of operators and tools on a real server with the demo model."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from tests.support.server_process import (
    ServerProcess,
    environment,
    open_requests,
    running,
    wait_until,
)

DEMO = Path(__file__).parent.parent.parent / "python" / "minisrv" / "checkpoint" / "demo_model"
CHAT = [{"role": "user", "content": "What is 17 + 25?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    arguments = ("--model", "demo", "--num-threads", "1", "--kv-memory", "16MiB")
    tmp_dir = tmp_path_factory.mktemp("s") / "t"
    with running(*arguments, tmp_dir=tmp_dir, hash_engine=False) as server:
        with httpx.Client(base_url=server.url) as client:
            tokens = "minisrv:generation_tokens_total"
            wait_until(lambda: tokens in metrics_of(client))
            assert metrics_of(client)[tokens] == 0, "the warm-up counts"
        yield server


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def oracle() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def metrics_of(http: httpx.Client) -> dict[str, float]:
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
    }


@pytest.mark.parametrize("text", ["Hi! What can you do?", "na\u00efve \U0001f600 \u4f60\u597d", ""])
def test_tokenize_and_detokenize_agree_with_transformers(
    http: httpx.Client, oracle: Any, text: str
) -> None:
    answer = http.post("/tokenize", json={"prompt": text}).json()
    assert answer["tokens"] == oracle(text)["input_ids"]
    assert answer["count"] == len(answer["tokens"])
    assert answer["token_strs"] == oracle.convert_ids_to_tokens(answer["tokens"])
    back = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": text, "text": text}


def test_the_rendered_prompt_agrees_with_transformers(http: httpx.Client, oracle: Any) -> None:
    for begin in (True, False):
        body = {"messages": CHAT, "add_generation_prompt": begin}
        ids = oracle.apply_chat_template(CHAT, add_generation_prompt=begin)["input_ids"]
        answer = http.post("/apply_template", json=body).json()
        assert answer["prompt"] == oracle.decode(ids)
        assert answer["tokens"] == ids
        assert http.post("/tokenize", json=body).json()["tokens"] == ids
    usage = http.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 1}).json()
    rendered = http.post("/apply_template", json={"messages": CHAT}).json()
    assert usage["usage"]["prompt_tokens"] == rendered["count"]


def test_tools_are_refused_where_a_chat_refuses_them(http: httpx.Client) -> None:
    """Each name may stand there once."""
    function = {"name": "add", "description": "Add.", "parameters": {"type": "object"}}
    body = {"messages": CHAT, "tools": [{"type": "function", "function": function}] * 2}
    chat = http.post("/v1/chat/completions", json={**body, "max_tokens": 1})
    assert chat.status_code == 400
    for path in ("/apply_template", "/tokenize"):
        response = http.post(path, json=body)
        assert (response.status_code, response.json()) == (400, chat.json())


def test_special_tokens_come_back_unless_they_are_skipped(http: httpx.Client, oracle: Any) -> None:
    ids = [oracle.eos_token_id]
    assert http.post("/detokenize", json={"tokens": ids}).json()["text"] == oracle.eos_token
    skipped = {"tokens": ids, "skip_special_tokens": True}
    assert http.post("/detokenize", json=skipped).json()["text"] == ""


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": CHAT}, "messages"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/apply_template", {}, "messages"),
    ],
)
def test_a_wrong_question_is_a_400_that_names_the_field(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_the_tokenizer_reports_what_lm_eval_reads(http: httpx.Client, oracle: Any) -> None:
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"] == oracle.eos_token
    assert info["chat_template"] == oracle.chat_template


def test_native_ids_are_those_of_the_text(http: httpx.Client, oracle: Any) -> None:
    prompt = http.post("/apply_template", json={"messages": CHAT}).json()
    sampling = {"temperature": 0, "max_new_tokens": 60, "skip_special_tokens": False}
    whole = http.post(
        "/generate", json={"input_ids": prompt["tokens"], "sampling_params": sampling}
    ).json()
    chat = http.post("/v1/chat/completions", json={"messages": CHAT, "temperature": 0}).json()
    ids = whole["output_ids"]
    assert "42" in chat["choices"][0]["message"]["content"]
    assert whole["text"] == chat["choices"][0]["message"]["content"]
    assert len(ids) == whole["meta_info"]["completion_tokens"] == chat["usage"]["completion_tokens"]
    assert oracle.decode(ids, skip_special_tokens=True) == whole["text"]
    body = {"text": prompt["prompt"], "sampling_params": sampling, "stream": True}
    lines = http.post("/generate", json=body).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert [id for event in events for id in event["output_ids"]] == ids
    assert "".join(event["text"] for event in events) == whole["text"]


def test_a_flush_forgets_cached_prefixes_and_waits_if_told_to(
    server: ServerProcess, http: httpx.Client
) -> None:
    body = {"prompt": "count up from one " * 8, "max_tokens": 2}

    def cached() -> int:
        usage = http.post("/v1/completions", json=body).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    cached()
    assert cached() > 0
    assert http.post("/flush_cache").json()["flushed_pages"] > 0
    assert cached() == 0
    warned = http.post("/flush_cache", json={"wait": 1})
    assert warned.headers["x-minisrv-warnings"] == "unknown fields ignored: wait"
    (stream,) = open_requests(server.url, num_streams=1, num_whole=0)
    refused = http.post("/flush_cache")
    assert refused.status_code == 400
    assert "open now: 1" in refused.json()["error"]["message"]
    results: list[int] = []
    flush = threading.Thread(
        target=lambda: results.append(
            http.post("/flush_cache", json={"timeout": 30}, timeout=60).status_code
        )
    )
    flush.start()
    assert httpx.post(f"{server.url}/abort", json={"abort_all": True}).json() == {"aborted": 1}
    flush.join()
    assert results == [200]
    assert "request_aborted" in stream.join().text


def test_metrics_tell_the_truth_under_load(server: ServerProcess, http: httpx.Client) -> None:
    before = metrics_of(http)
    streams = open_requests(server.url, num_streams=3, num_whole=0)
    wait_until(lambda: metrics_of(http)["minisrv:num_requests_running"] == 3)
    during = metrics_of(http)
    assert 0 < during["minisrv:kv_cache_usage_perc"] <= 1
    (load,) = http.get("/v1/loads").json()["loads"]
    assert (load["num_running_reqs"], load["num_open_reqs"]) == (3, 3)
    assert 0 < load["num_used_tokens"] <= load["max_total_num_tokens"]
    used = load["num_pages"] - load["num_free_pages"]
    assert used * load["page_size"] == load["num_used_tokens"]
    assert load["num_queued_tokens"] == 0
    assert load["decode_tokens_per_s"] > 0 < load["prefill_tokens_per_s"]
    http.post("/abort_request", json={"abort_all": True})
    for stream in streams:
        stream.join()
    for name in ("running", "waiting"):
        wait_until(lambda name=name: metrics_of(http)[f"minisrv:num_requests_{name}"] == 0)
    body = {"prompt": "Hi", "max_tokens": 20, "ignore_eos": True, "n": 2}
    http.post("/v1/completions", json=body)
    wait_until(lambda: metrics_of(http)["minisrv:kv_cache_usage_perc"] == 0)
    after = metrics_of(http)
    generated = after["minisrv:generation_tokens_total"] - before["minisrv:generation_tokens_total"]
    assert generated >= 43
    intervals = "minisrv:inter_token_latency_seconds_count"
    assert after[intervals] - before[intervals] == generated - 5
    assert after["minisrv:cache_config_info"] == 1
    assert after["minisrv:prefix_cache_hits_total"] <= after["minisrv:prefix_cache_queries_total"]


def test_the_tree_shows_the_path_of_a_request_and_its_text_only_on_demand(
    http: httpx.Client,
) -> None:
    prompt = "These are the bytes of a prompt that fills several pages of the cache."
    body = {"prompt": prompt, "max_tokens": 2, "request_id": "seen-in-the-tree"}
    assert http.post("/v1/completions", json=body).status_code == 200
    query = {"request_id": "seen-in-the-tree", "text": "true"}
    tree = http.get("/v1/cache/tree", params=query).json()
    texts = {node["id"]: node["text"] for node in tree["nodes"]}
    assert texts[tree["path"][0]].removeprefix("<s>").startswith(prompt[:16])
    tokens = sum(node["tokens"] for node in tree["nodes"] if node["id"] in tree["path"])
    assert tokens >= 2 * tree["page_size"]
    assert "text" not in http.get("/v1/cache/tree").json()["nodes"][0]


def test_the_parts_of_the_time_make_up_the_whole(http: httpx.Client) -> None:
    body = {"prompt": "Hi", "max_tokens": 40, "ignore_eos": True, "timings": True}
    others = []
    for _ in range(3):  # a process may have to wait for its turn
        timings = http.post("/v1/completions", json=body).json()["timings"]
        parts = timings["queue_ms"] + timings["prefill_ms"] + timings["decode_ms"]
        assert timings["prefill_ms"] > 0
        assert timings["decode_ms"] > 0
        others.append(timings["total_ms"] - parts)
    assert 0 <= min(others) < 200


def test_the_server_reports_how_it_was_set_up(http: httpx.Client) -> None:
    info = http.get("/server_info").json()
    assert info["model"] == "demo"
    assert info["config"]["kv_memory"] == "16MiB"
    assert info["max_model_len"] > 0
    assert "warm-up" in info["start_seconds"]
    assert "KV" in info["memory_plan"] or "cache" in info["memory_plan"]


def make_certificate(directory: Path) -> tuple[Path, Path]:
    cert, key = directory / "cert.pem", directory / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return cert, key


def test_https_with_keys_and_json_logs(model_dir: Path, socket_dir: Path, tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    arguments = ["--model", str(model_dir), "--api-key", "user", "--log-format", "json"]
    tls = ["--ssl-certfile", str(cert), "--ssl-keyfile", str(key)]
    server = ServerProcess(*arguments, *tls, tmp_dir=socket_dir)
    try:
        assert server.url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=server.url, verify=context) as client:
            wait_until(lambda: client.get("/ready").status_code == 200)
            body = {"prompt": "hi", "max_tokens": 3}
            assert client.post("/v1/completions", json=body).status_code == 401
            client.headers["Authorization"] = "Bearer user"
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200
            request_id = response.headers["x-request-id"]
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url.replace("https", "http") + "/health")
        with pytest.raises(httpx.ConnectError, match="certificate"):
            httpx.get(server.url + "/health")

        def lines() -> list[dict[str, Any]]:
            found = [json.loads(line) for line in server.lines if line.startswith("{")]
            return [line for line in found if line.get("id") == request_id]

        wait_until(lambda: len(lines()) == 2)
        first, last = lines()
        assert first["event"] == "started"
        assert last["event"] == "POST /v1/completions"
        assert (last["status"], last["output"]) == (200, 3)
        assert "/ready" not in server.output
    finally:
        server.end()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--api-key", ""], "a key is empty"),
        (["--admin-key", "two words"], "a key is empty or has other than printable ASCII"),
        (["--ssl-certfile", "/no/such.pem"], "/no/such.pem cannot be used: No such file"),
        (["--ssl-certfile", __file__], "cannot be used: [SSL]"),
        (["--ssl-keyfile", "/no/such.pem"], "--ssl-keyfile needs --ssl-certfile"),
        (["--api-key-file", "/no/such"], "--api-key-file cannot be read"),
    ],
)
def test_what_would_leave_the_server_open_stops_the_start(
    arguments: list[str], sentence: str
) -> None:
    command = [sys.executable, "-m", "minisrv.launch_server", "--port", "0", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert sentence in done.stderr
