"""A server publishes what joins and leaves its cache, and goes on when the publisher dies."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.support.kv_event_reader import Reader
from tests.support.server_process import ServerProcess, running, wait_until

PAGE_SIZE = 16
PROMPT = "The quick brown fox jumps over the lazy dog, and does so again and again."


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def complete(server: ServerProcess, prompt: str, **fields: str) -> list[int]:
    """The token ids of the prompt and of the reply."""
    body = {"prompt": prompt, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
    reply = httpx.post(f"{server.url}/v1/completions", json=body | fields, timeout=30).json()
    (choice,) = reply["choices"]
    ids: list[int] = choice["prompt_token_ids"] + choice["token_ids"]
    return ids


def read_until(reader: Reader, done: Callable[[], bool]) -> None:
    """Follow the events until the index is as expected.

    A batch sent before the subscription (again) exists is lost, and no later one may show the gap:
    so the reader also asks when nothing arrives.
    """

    def ask() -> None:
        reader.ask(0 if reader.last is None else reader.last + 1)
        reader.take_replay()

    def follow() -> bool:
        while (batch := reader.receive(0.5)) is not None:
            topic, number, content = batch
            assert topic == b"kv@pod@a model"
            if reader.misses(number):
                ask()
            reader.apply(number, content)
            if done():
                return True
        ask()
        return done()

    wait_until(follow, 30)


def test_a_reader_knows_the_cache_of_a_server(model_dir: Path, socket_dir: Path) -> None:
    events, replay = free_port(), free_port()
    arguments = ("--model", str(model_dir), "--served-model-name", "a model")
    arguments += ("--kv-events-endpoint", str(events), "--kv-events-buffer", "100")
    arguments += ("--kv-events-replay-endpoint", f"tcp://127.0.0.1:{replay}")
    arguments += ("--kv-events-topic", "kv@pod@{model}")
    with running(*arguments, tmp_dir=socket_dir) as server:
        reader = Reader(f"tcp://127.0.0.1:{events}", f"tcp://127.0.0.1:{replay}", PAGE_SIZE)

        def holds(salt: str, ids: list[int]) -> bool:
            # The last token is sampled, not computed.
            ends = range(PAGE_SIZE, len(ids), PAGE_SIZE)
            return {(salt, tuple(ids[:end])) for end in ends} <= reader.index.prefixes()

        first = complete(server, PROMPT)
        salted = complete(server, PROMPT, cache_salt="tenant")
        read_until(reader, lambda: holds("", first) and holds("tenant", salted))
        body = {"prompt": PROMPT}
        (rendered,) = httpx.post(f"{server.url}/v1/completions/render", json=body).json()
        assert holds("", rendered["token_ids"])
        before = reader.last
        assert before is not None

        server.child("kv_events").kill()
        wait_until(lambda: "it is started again" in server.output)
        second = complete(server, "And " + PROMPT)
        read_until(reader, lambda: holds("", second))
        assert holds("", first)
        assert reader.last is not None
        assert reader.last > before + 1000  # far beyond what the first publisher could have sent
        assert reader.num_wholes >= 1

        assert httpx.post(f"{server.url}/flush_cache", json={"timeout": 5}).status_code == 200
        read_until(reader, lambda: not reader.index.blocks)
        reader.close()
        server.popen.terminate()
        assert server.wait() == 0
        server.assert_nothing_is_left()


def test_an_address_in_use_ends_the_start_with_a_sentence(
    model_dir: Path, socket_dir: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = ("--model", str(model_dir), "--kv-events-endpoint", str(port))
        server = ServerProcess(*arguments, tmp_dir=socket_dir)
        assert server.wait() == 2
    assert f"readers of KV events at tcp://127.0.0.1:{port}" in server.output
