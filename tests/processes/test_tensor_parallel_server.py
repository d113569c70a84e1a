"""A server with two ranks: it answers, listens on loopback alone, and ends as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from minisrv import LLM
from tests.support.server_process import ServerProcess, open_requests, running

ARGUMENTS = ("--model", "demo", "--dtype", "float32", "--num-threads", "1", "--kv-memory", "64MiB")
QUESTIONS = ["What is 58 + 67?", "Count from 3 to 9.", "Who are you?"]


@pytest.fixture
def server(socket_dir: Path) -> Iterator[ServerProcess]:
    arguments = (*ARGUMENTS, "--tp", "2", "--restart-limit", "0")
    with running(*arguments, tmp_dir=socket_dir, hash_engine=False) as server:
        yield server


def listeners(server: ServerProcess) -> list[tuple[str, str]]:
    """The address and the module of every TCP listener of the supervisor's children.

    The supervisor keeps only the frontend's.
    """
    found = {
        process: {
            connection.laddr
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        for process in (psutil.Process(server.popen.pid), *server.family)
    }
    assert found.pop(psutil.Process(server.popen.pid)) == found[server.child("frontend")]
    return sorted((at.ip, one.cmdline()[-1]) for one, all_at in found.items() for at in all_at)


def test_two_ranks_answer_as_one_does_with_aborts_in_between(server: ServerProcess) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    answers = []
    for question in QUESTIONS:
        body = {"prompt": "go on", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as abandoned:
            next(abandoned.iter_lines())
        chunks = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": question}], stream=True
        )
        answers.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
    with LLM("demo", dtype="float32", num_threads=1, kv_memory="64MiB") as llm:
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
        assert answers == llm.chat(chats, use_tqdm=False)
    frontend, *others = sorted(listeners(server), key=lambda found: found[1] != "minisrv.frontend")
    assert frontend == ("127.0.0.1", "minisrv.frontend")
    assert {ip for ip, _ in others} <= {"127.0.0.1"}
    assert {module for _, module in others} <= {"minisrv.scheduler", "minisrv.engine.parallel"}
    server.popen.terminate()
    assert server.wait() == 0
    server.assert_nothing_is_left()


@pytest.mark.parametrize("busy", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_without_restarts_the_death_of_a_rank_ends_all_and_is_reported(
    server: ServerProcess, busy: bool
) -> None:
    requests = open_requests(server.url, num_streams=1, num_whole=0) if busy else ()
    server.child("engine.parallel").kill()
    for request in requests:
        *_, error, done = request.join().events
        assert "engine_dead" in error
        assert done == "[DONE]"
    assert server.wait() == 1
    assert "the rank 1 process has died: it was killed by SIGKILL" in server.output
    server.assert_nothing_is_left()


@pytest.mark.soak
def test_without_restarts_the_death_of_the_scheduler_ends_its_ranks(server: ServerProcess) -> None:
    server.child("scheduler").kill()
    assert server.wait() == 1
    server.assert_nothing_is_left()
