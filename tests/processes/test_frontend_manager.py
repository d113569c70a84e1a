"""Embedding: the engine's processes behind the caller's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from nbclient import NotebookClient

from minisrv import FrontendManager, SamplingParams, ServerConfig
from minisrv.errors import (
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    NotReadyError,
    RequestFailedError,
)
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.frontend_manager import Ack
from minisrv.supervision import supervisor
from minisrv.supervision.records import FIRST_EPOCH
from minisrv.wire.messages import TokenizeMsg
from minisrv.wire.sockets import Epoch, Outbox
from tests.support.hash_engine import expected_output
from tests.support.scripted_backend import reply
from tests.support.server_process import VOCAB_SIZE, environment

PROMPT = (5, 6, 7)
SETUP = """
from minisrv import FrontendManager, SamplingParams
from minisrv.supervision import supervisor
from minisrv.wire.messages import TokenizeMsg
supervisor.MODULES["scheduler"] = "tests.support.hash_scheduler"

async def answer():
    async with FrontendManager(model={model!r}) as manager:
        uid = manager.new_user()
        sampling = SamplingParams(max_tokens=12, ignore_eos=True)
        await manager.send_one(TokenizeMsg(uid=uid, prompt=(5, 6, 7), sampling=sampling))
        return [ack.output_tokens async for ack in manager.wait_for_ack(uid)][-1]
"""


Children = Callable[[], list[psutil.Process]]


@pytest.fixture(autouse=True)
def _hash_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(supervisor.MODULES, "scheduler", "tests.support.hash_scheduler")


@pytest.fixture(autouse=True)
def _nothing_is_left(new_children: Children) -> Iterator[None]:
    yield
    assert not new_children()


def message(uid: int, **sampling: object) -> TokenizeMsg:
    params = SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
    return TokenizeMsg(uid=uid, prompt=PROMPT, sampling=params)


def with_manager(model_dir: Path, use: Callable[[FrontendManager], Awaitable[None]]) -> None:
    async def run() -> None:
        async with FrontendManager(model=str(model_dir)) as manager:
            await use(manager)
            assert manager.registry.num_open == 0

    asyncio.run(run())


def expected_text(count: int) -> str:
    """What the byte-level tokenizer of the test makes of the oracle's ids."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_of = {letter: byte for byte, letter in _letters().items()}
    ids = expected_output(PROMPT, count, VOCAB_SIZE)
    return bytes(byte_of[alphabet[i]] for i in ids if i < 256).decode(errors="replace")


def _letters() -> dict[int, str]:
    """The printable letter of each byte, as GPT-2 defined it (Radford et al., 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def test_acks_and_text_equal_the_oracle(model_dir: Path) -> None:
    async def use(manager: FrontendManager) -> None:
        uid = manager.new_user()
        await manager.send_one(message(uid))
        acks = [ack async for ack in manager.wait_for_ack(uid)]
        assert [ack.finished for ack in acks] == [False] * (len(acks) - 1) + [True]
        assert "".join(ack.incremental_output for ack in acks) == expected_text(12)
        assert acks[-1] == Ack(
            uid=uid,
            incremental_output=acks[-1].incremental_output,
            finished=True,
            finish_reason="length",
            stop_reason=None,
            prompt_tokens=3,
            cached_tokens=0,
            output_tokens=12,
        )
        streamed = manager.new_user()
        manager.send_one(message(streamed))  # it is sent whether awaited or not
        text = "".join([piece async for piece in manager.stream_generate(streamed)])
        assert text == expected_text(12)

    with_manager(model_dir, use)


def test_each_choice_has_a_uid_of_its_own(model_dir: Path) -> None:
    async def use(manager: FrontendManager) -> None:
        uid = manager.new_user(n=3)
        await manager.send_one(message(uid, n=3))
        last = {ack.uid: ack async for ack in manager.wait_for_ack(uid)}
        assert set(last) == {uid, uid + 1, uid + 2}
        assert all(ack.finished and ack.output_tokens == 12 for ack in last.values())
        assert manager.new_user() == uid + 3
        manager.abort(uid + 3)

    with_manager(model_dir, use)


def test_leaving_a_stream_early_frees_the_request(model_dir: Path) -> None:
    async def use(manager: FrontendManager) -> None:
        uid = manager.new_user()
        await manager.send_one(message(uid, max_tokens=2000))
        acks = manager.wait_for_ack(uid)
        await anext(acks)
        await acks.aclose()
        while manager.registry.num_open:
            await asyncio.sleep(0.01)

    with_manager(model_dir, use)


def test_a_refused_request_raises_what_http_would_answer(model_dir: Path) -> None:
    async def use(manager: FrontendManager) -> None:
        uid = manager.new_user()
        await manager.send_one(message(uid, max_tokens=10**6))
        with pytest.raises(RequestFailedError, match="maximum context length") as caught:
            [ack async for ack in manager.wait_for_ack(uid)]
        assert caught.value.http_status == 400
        assert caught.value.code == "context_length_exceeded"

    with_manager(model_dir, use)


def test_a_message_must_fit_its_uid(model_dir: Path) -> None:
    async def use(manager: FrontendManager) -> None:
        uid = manager.new_user()
        with pytest.raises(InvalidRequestError, match="n=2"):
            manager.send_one(message(uid, n=2))
        manager.abort(uid)
        with pytest.raises(InvalidRequestError, match=f"uid {uid}"):
            manager.send_one(message(uid))

    with_manager(model_dir, use)


def test_a_death_raises_in_every_open_stream(
    model_dir: Path, new_children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINISRV_TEST_STEP_S", "0.01")

    async def run() -> None:
        manager = FrontendManager(model=str(model_dir), restart_limit="0")
        await manager.start()
        uid = manager.new_user()
        await manager.send_one(message(uid, max_tokens=2000))
        (process,) = [
            p for p in new_children() if p.cmdline()[-1] == "tests.support.hash_scheduler"
        ]

        async def kill_at_first_ack() -> None:
            async for _ in manager.wait_for_ack(uid):
                with contextlib.suppress(ProcessLookupError):  # by the second ack it may be gone
                    os.kill(process.pid, signal.SIGKILL)

        with pytest.raises(RequestFailedError, match="the scheduler process has died"):
            await kill_at_first_ack()
        with pytest.raises(RequestFailedError, match="the scheduler process has died"):
            manager.new_user()
        await manager.aclose()

    asyncio.run(run())


def test_a_reply_that_makes_no_sense_ends_the_engine_and_not_the_program(
    model_dir: Path, new_children: Children
) -> None:
    async def run() -> None:
        manager = FrontendManager(model=str(model_dir))
        await manager.start()
        assert manager._thread is not None
        outbox = Outbox(manager._thread._supervisor.run_dir, "frontend", Epoch(FIRST_EPOCH))
        uid = manager.new_user()
        await manager.send_one(message(uid, max_tokens=2000))
        outbox.send(reply(uid, "a", 1, finish=99))  # type: ignore[arg-type]
        with pytest.raises(RequestFailedError, match="99"):
            async for _ in manager.wait_for_ack(uid):
                pass
        while new_children():
            await asyncio.sleep(0.02)
        outbox.close()
        await manager.aclose()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_closing_fails_every_open_stream(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISRV_TEST_STEP_S", "0.01")

    async def run() -> None:
        manager = FrontendManager(model=str(model_dir))
        await manager.start()
        uids = [manager.new_user() for _ in range(3)]
        begun = asyncio.Semaphore(0)

        async def read(uid: int) -> None:
            async for ack in manager.wait_for_ack(uid):
                assert not ack.finished
                begun.release()

        for uid in uids:
            await manager.send_one(message(uid, max_tokens=2000))
        readers = [asyncio.create_task(read(uid)) for uid in uids]
        for _ in range(2 * len(uids)):
            await begun.acquire()
        await manager.aclose()
        for ended in await asyncio.gather(*readers, return_exceptions=True):
            assert isinstance(ended, RequestFailedError)
            assert ended.code == "server_draining"
        assert manager.registry.num_open == 0
        await manager.aclose()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_notice_that_cannot_be_handled_ends_the_start_and_not_the_program(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(registry: RequestRegistry, progress: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(RequestRegistry, "set_ready", fail)

    async def run() -> None:
        with pytest.raises(EngineDeadError):
            await FrontendManager(model=str(model_dir)).start()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_before_its_start_the_manager_says_what_to_do(model_dir: Path) -> None:
    with pytest.raises(NotReadyError, match="start"):
        FrontendManager(model=str(model_dir)).new_user()


def test_a_model_that_cannot_be_used_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer|config\.json"):
        asyncio.run(FrontendManager(model=str(tmp_path)).start())
    with pytest.raises(ConfigError, match="no such directory"):
        asyncio.run(FrontendManager(ServerConfig(model="/no/such/model")).start())


def test_a_start_that_is_given_up_leaves_nothing(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINISRV_TEST_GATE", str(tmp_path / "never"))

    async def run() -> None:
        async with asyncio.timeout(1), FrontendManager(model=str(model_dir)):
            pass

    with pytest.raises(TimeoutError):
        asyncio.run(run())


def test_close_works_without_an_event_loop(model_dir: Path, new_children: Children) -> None:
    manager = FrontendManager(model=str(model_dir))
    asyncio.run(manager.start())
    assert len(new_children()) == 3
    manager.close()


@pytest.mark.parametrize("how", ["script", pytest.param("stdin", marks=pytest.mark.soak)])
def test_it_needs_no_main_guard(how: str, model_dir: Path, tmp_path: Path) -> None:
    program = SETUP.format(model=str(model_dir)) + "import asyncio; print(asyncio.run(answer()))"
    script = tmp_path / "script.py"
    script.write_text(program)
    done = subprocess.run(
        [sys.executable, str(script) if how == "script" else "-"],
        input=program if how == "stdin" else "",
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "12\n", done.stderr


def test_a_program_that_forgets_to_close_it_ends_and_leaves_nothing(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    program = SETUP.format(model=str(model_dir)) + (
        "import asyncio, psutil\n"
        "async def main():\n"
        f"    manager = FrontendManager(model={str(model_dir)!r})\n"
        "    await manager.start()\n"
        "    print(*(p.pid for p in psutil.Process().children()))\n"
        "asyncio.run(main())\n"
    )
    tmp_dir = tmp_path_factory.mktemp("s")
    done = subprocess.run(
        [sys.executable, "-"],
        input=program,
        env=environment(TMPDIR=str(tmp_dir)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not list(tmp_dir.iterdir())


@pytest.mark.soak
def test_it_works_in_a_notebook(model_dir: Path) -> None:
    cells = [SETUP.format(model=str(model_dir)), "await answer()", "await answer()"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(env=environment())
    results = [cell.outputs[0].data["text/plain"] for cell in notebook.cells[1:]]
    assert [json.loads(result) for result in results] == [12, 12]
