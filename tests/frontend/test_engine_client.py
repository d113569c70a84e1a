"""The client and a back end in one process, joined by real sockets."""

import asyncio
from pathlib import Path

import pytest

from minisrv.config import ServerConfig
from minisrv.errors import EngineDeadError, OverloadedError, RequestFailedError
from minisrv.frontend.registry.engine_client import EngineClient
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.sampling_params import SamplingParams
from minisrv.supervision.run_dir import private_directory
from minisrv.wire.codec import encode
from minisrv.wire.messages import (
    SCHEDULER_INBOX,
    TOKENIZER_INBOX,
    AbortMsg,
    Finish,
    TakenMsg,
    TokenizeMsg,
)
from minisrv.wire.sockets import INBOX_BYTES, AsyncInbox, Epoch, Inbox, Outbox
from tests.support.http_server import MODEL
from tests.support.scripted_backend import reply


def never() -> None:
    raise AssertionError


async def _round_trips(run_dir: Path) -> None:
    registry = RequestRegistry(ServerConfig(num_tokenizers=2))
    inboxes = [AsyncInbox(run_dir, f"tokenizer-{i}", TOKENIZER_INBOX, Epoch(4)) for i in range(2)]
    scheduler = AsyncInbox(run_dir, "scheduler", SCHEDULER_INBOX, Epoch(4))
    async with EngineClient(run_dir, registry, num_tokenizers=2, epoch=4, on_error=never):
        registry.set_ready(MODEL)
        back = Outbox(run_dir, "frontend", Epoch(4))
        for inbox in inboxes:
            base = registry.open()
            sampling = SamplingParams(temperature=0.5)
            registry.send(TokenizeMsg(uid=base, prompt="hi", sampling=sampling))
            assert isinstance(await inbox.receive(), TokenizeMsg)
            back._socket.send(encode(reply(base, "stale", 1, Finish.STOP), epoch=3))
            back.send(reply(base, "a", 1))
            back.send(reply(base, "b", 2, Finish.STOP))
            assert "".join([event.text async for event in registry.events(base)]) == "ab"
        base = registry.open()
        registry.send(TokenizeMsg(uid=base, prompt="hi", sampling=sampling))
        registry.abort(base)
        assert isinstance(await inboxes[0].receive(), TokenizeMsg)
        assert await inboxes[0].receive() == AbortMsg(uids=(base,))
        assert await scheduler.receive() == AbortMsg(uids=(base,))
        back.close()
    for inbox in (*inboxes, scheduler):
        inbox.close()


def test_messages_and_replies_pass_the_sockets_and_stale_ones_are_dropped() -> None:
    with private_directory() as run_dir:
        asyncio.run(asyncio.wait_for(_round_trips(run_dir), 60))


async def _bad_reply(run_dir: Path) -> None:
    registry = RequestRegistry(ServerConfig())
    errors: list[str] = []
    async with EngineClient(
        run_dir, registry, num_tokenizers=1, epoch=4, on_error=lambda: errors.append("called")
    ) as client:
        registry.set_ready(MODEL)
        back = Outbox(run_dir, "frontend", Epoch(4))
        base = registry.open()
        back.send(reply(base, "a", 1, finish=99))
        (event,) = await registry.all_events(base)
        with pytest.raises(RequestFailedError, match="99"):
            event.raise_failure()
        assert isinstance(client.error, EngineDeadError)
        assert errors == ["called"]
        back.close()


def test_a_reply_that_makes_no_sense_fails_all_requests_and_is_reported() -> None:
    with private_directory() as run_dir:
        asyncio.run(asyncio.wait_for(_bad_reply(run_dir), 60))


async def _full_inbox(run_dir: Path) -> None:
    registry = RequestRegistry(ServerConfig())
    tokenizer = Inbox(run_dir, "tokenizer-0", TOKENIZER_INBOX, Epoch(4))
    text = "x" * (8 * 2**20)
    async with EngineClient(run_dir, registry, num_tokenizers=1, epoch=4, on_error=never):
        registry.set_ready(MODEL)
        back = Outbox(run_dir, "frontend", Epoch(4))

        def submit(text: str) -> int:
            base = registry.open()
            sampling = SamplingParams(temperature=0.5)
            registry.send(TokenizeMsg(uid=base, prompt=text, sampling=sampling))
            return base

        num_fit = INBOX_BYTES // (len(text) + 1000)
        held = [submit(text) for _ in range(num_fit)]
        with pytest.raises(OverloadedError) as refusal:
            submit(text)
        assert refusal.value.reason == "inbox"
        # An abort passes however full the inbox is, and its message arrives behind the request.
        registry.abort(held[0])
        frames: list[tuple[object, int]] = []
        while len(frames) <= len(held):
            tokenizer.wait(1)
            frames += tokenizer.drain_frames()
        assert frames[-1][0] == AbortMsg(uids=(held[0],))
        back.send(TakenMsg(tokenizer=0, num_bytes=sum(num_bytes for _, num_bytes in frames)))
        while True:
            try:
                submit(text)
                break
            except OverloadedError:
                await asyncio.sleep(0.01)
        back.close()
    tokenizer.close()


def test_a_tokenizer_that_does_not_read_has_a_bounded_inbox_and_never_blocks_the_loop() -> None:
    with private_directory() as run_dir:
        asyncio.run(asyncio.wait_for(_full_inbox(run_dir), 60))
