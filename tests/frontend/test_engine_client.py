"""The client and a back end in one process, joined by real sockets."""

import asyncio
from pathlib import Path

import pytest

from minisrv.config import ServerConfig
from minisrv.errors import RequestFailedError
from minisrv.frontend.registry.engine_client import EngineClient
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.sampling_params import SamplingParams
from minisrv.supervision.run_dir import private_directory
from minisrv.wire.codec import encode
from minisrv.wire.messages import TOKENIZER_INBOX, AbortMsg, Finish, TokenizeMsg
from minisrv.wire.sockets import AsyncInbox, Outbox
from tests.support.http_server import MODEL
from tests.support.scripted_backend import reply


async def _round_trips(run_dir: Path) -> None:
    registry = RequestRegistry(ServerConfig(num_tokenizers=2))
    inboxes = [AsyncInbox(run_dir, f"tokenizer-{i}", TOKENIZER_INBOX, 4) for i in range(2)]
    async with EngineClient(run_dir, registry, num_tokenizers=2, epoch=4):
        registry.set_ready(MODEL)
        back = Outbox(run_dir, "frontend", epoch=4)
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
        back.close()
    for inbox in inboxes:
        inbox.close()


def test_messages_and_replies_pass_the_sockets_and_stale_ones_are_dropped() -> None:
    with private_directory() as run_dir:
        asyncio.run(asyncio.wait_for(_round_trips(run_dir), 20))


async def _bad_reply(run_dir: Path) -> None:
    registry = RequestRegistry(ServerConfig())
    async with EngineClient(run_dir, registry, num_tokenizers=1, epoch=4):
        registry.set_ready(MODEL)
        back = Outbox(run_dir, "frontend", epoch=4)
        base = registry.open()
        back.send(reply(base, "a", 1, finish=99))
        (event,) = await registry.all_events(base)
        with pytest.raises(RequestFailedError, match="99"):
            event.raise_failure()
        back.close()


def test_a_reply_that_makes_no_sense_fails_all_requests_and_leaves_none_waiting() -> None:
    with private_directory() as run_dir:
        asyncio.run(asyncio.wait_for(_bad_reply(run_dir), 20))
