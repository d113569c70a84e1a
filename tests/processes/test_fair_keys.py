"""Two API keys on one server, one of which sends far more than the other."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest

from tests.support.server_process import ServerProcess, running, wait_until

pytestmark = pytest.mark.timed

STEP_S = 0.05
NUM_CROWD = 60


def ask(server: ServerProcess, key: str, *texts: str) -> float:
    """Send prompts of one token per character; the seconds in the queue until the first step."""
    body = {"prompt": texts, "max_tokens": 1}
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200
    return float(answer.headers["server-timing"].split("queue;dur=")[1].split(",")[0]) / 1000


@pytest.mark.parametrize("fair", [True, False])
def test_a_crowd_of_one_key_does_not_hold_up_another_key(
    fair: bool, model_dir: Path, socket_dir: Path
) -> None:
    """Each prompt of the crowd takes a whole step, so that all take three seconds."""
    keys = ("--api-key", "crowd", "--api-key", "single", *(["--fair-keys"] if fair else []))
    with running("--model", str(model_dir), *keys, tmp_dir=socket_dir, step_s=STEP_S) as server:
        texts = [f"{i:04}" * 16 for i in range(NUM_CROWD)]
        crowd = threading.Thread(target=ask, args=(server, "crowd", *texts))
        crowd.start()
        headers = {"Authorization": "Bearer single"}

        def waiting() -> int:
            loads = httpx.get(f"{server.url}/v1/loads", headers=headers).json()["loads"]
            return int(loads[0].get("num_waiting_reqs", 0))  # none before the first report

        wait_until(lambda: waiting() >= NUM_CROWD // 2)
        queue_s = ask(server, "single", "t" * 16)
        num_waiting = waiting()
        crowd.join()
    if fair:
        assert queue_s < 10 * STEP_S
        assert num_waiting > 10
    else:
        assert queue_s > 15 * STEP_S
