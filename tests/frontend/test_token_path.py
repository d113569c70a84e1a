"""How far a text token travels inside the frontend: a promise about its structure."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

import minisrv.frontend
from minisrv.config import ServerConfig
from minisrv.frontend.app import create_app
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.frontend.registry.registry import RequestRegistry
from minisrv.sampling_params import SamplingParams
from minisrv.wire.messages import Start, UserReply

FRONTEND = Path(minisrv.frontend.__path__[0])
MODEL = ModelInfo(
    name="m", created=1, max_model_len=4096, vocab_size=1000, defaults=SamplingParams()
)
# Bytecode before the body of a coroutine; a frame further on is one that is resumed.
FIRST_INSTRUCTIONS = 10


def reply(count: int, *starts: Start) -> UserReply:
    return UserReply(
        uids=np.array([1]),
        texts=("a",),
        output_tokens=np.array([count], np.int32),
        finishes=np.array([0], np.uint8),
        stop_reasons=(None,),
        new_ids=np.array([7], np.int32),
        num_new_ids=np.array([1], np.int32),
        starts=starts,
    )


async def files_of_five_tokens(path: str, body: dict[str, Any]) -> set[str]:
    """The frontend's files in which a function is called for a token after the first."""
    registry = RequestRegistry(ServerConfig(model="m"))
    submitted = asyncio.Event()
    registry.connect(lambda index, message: submitted.set())
    registry.set_ready(MODEL)
    incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "query_string": b"",
    }
    app = create_app(ServerConfig(model="m"), registry)
    task = asyncio.ensure_future(app(scope, incoming.get, send))
    start = Start(
        uid=1, prompt_tokens=1, cached_tokens=0, min_tokens=0, stop=(), skip_special_tokens=True
    )
    await submitted.wait()
    registry.receive(reply(1, start))
    await asyncio.sleep(0.05)
    files: set[str] = set()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and frame.f_lasti < FIRST_INSTRUCTIONS and FRONTEND in file.parents:
            files.add(str(file.relative_to(FRONTEND)))

    num_sent = len(sent)
    sys.setprofile(profile)
    for count in range(2, 7):
        registry.receive(reply(count))
        for _ in range(5):
            await asyncio.sleep(0)
    sys.setprofile(None)
    assert len(sent) == num_sent + 5
    incoming.put_nowait({"type": "http.disconnect"})
    await task
    return files


def test_a_streamed_text_token_runs_code_of_five_files() -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True}
    files = asyncio.run(files_of_five_tokens("/v1/chat/completions", body))
    assert files == {
        "registry/registry.py",
        "registry/open_request.py",
        "generation/run.py",
        "generation/event_reader.py",
        "apis/openai/chat.py",
    }


def test_a_streamed_completion_takes_the_same_way() -> None:
    files = asyncio.run(files_of_five_tokens("/v1/completions", {"prompt": "a", "stream": True}))
    assert len(files) == 5
    assert "apis/openai/completions.py" in files
