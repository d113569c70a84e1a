"""What Ray adds to the latency of a stream, and more replicas when tokens are queued."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from tests.ray.fleet import Answer, ask, fleet, replica_processes
from tests.support.server_process import wait_until, write_model_dir

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.soak
MAX_SEQ_LEN = 16384


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = write_model_dir(tmp_path / "bytes")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "max_position_embeddings": MAX_SEQ_LEN}))
    return directory


def test_latency_that_ray_adds_to_a_chunk_of_one_stream(tmp_path: Path, model_dir: Path) -> None:
    with fleet(tmp_path, model_dir, step_s=0.02) as one:
        one.deploy(num_replicas=1)
        body = {"prompt": "go on", "max_tokens": 500, "ignore_eos": True, "stream": True}
        asyncio.run(ask(one.port, "warm", body))
        answer = asyncio.run(ask(one.port, "watched", body))
        written = [note[1:] for note in one.notes("piece") if note[0] == "watched"]
    sizes, written_at = zip(*written, strict=True)
    assert len(answer.ends_at) > 0.9 * len(written), "pieces are joined"
    # A piece may hold several; it can come when the last of them has been written.
    last = np.searchsorted(np.cumsum(sizes), answer.ends_at)
    added = 1000 * (np.array(answer.pieces_at) - np.array(written_at)[last])
    p50, p99 = np.percentile(added, (50, 99))
    print(f"\nfrom the replica to the client: {p50:.2f} ms at p50, {p99:.2f} ms at p99")
    assert 0 < p50 < 50


def test_more_replicas_start_when_tokens_are_queued(tmp_path: Path, model_dir: Path) -> None:
    scaling = {"target_queued_tokens": 500, "target_ongoing_requests": 1000}
    with fleet(tmp_path, model_dir, free_token_s=0.002) as one:
        one.deploy(num_replicas=1, max_replicas=2, upscale_delay_s=1, **scaling)
        assert len(replica_processes()) == 1
        body = {"prompt": [100] * 8000, "max_tokens": 1}

        async def load() -> list[Answer]:
            bodies = [{**body, "prompt": [100 + i] * 8000} for i in range(4)]
            return await asyncio.gather(*(ask(one.port, f"{i}", b) for i, b in enumerate(bodies)))

        answers = asyncio.run(load())
        assert {answer.reply.status for answer in answers} == {200}
        wait_until(lambda: len(replica_processes()) == 2)
