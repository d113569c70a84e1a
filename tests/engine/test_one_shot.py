"""Where a sum over the ranks in one launch is refused."""

from __future__ import annotations

import pytest
import torch

from minisrv.config import ServerConfig
from minisrv.engine.parallel.one_shot import check_one_shot, check_one_shot_dtype
from minisrv.errors import ConfigError
from minisrv.llm import LLM

CUDA = torch.device("cuda", 1)
CONFIG = ServerConfig(tp=2, one_shot_all_reduce_kib=256)


@pytest.mark.parametrize(
    ("config", "rank", "device", "reason"),
    [
        (ServerConfig(one_shot_all_reduce_kib=1), 0, CUDA, "requires several ranks, and --tp is 1"),
        (CONFIG, 1, torch.device("cpu"), "requires GPUs, but the device is a CPU"),
        (CONFIG, 1, CUDA, "requires that GPU 1 can access the memory of GPU 0"),
    ],
)
def test_it_is_refused_where_it_cannot_be(
    config: ServerConfig,
    rank: int,
    device: torch.device,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: False)
    with pytest.raises(ConfigError, match=f"^--one-shot-all-reduce-kib {reason}$"):
        check_one_shot(config, rank, device)


def test_it_is_refused_for_float16_and_in_programs() -> None:
    with pytest.raises(ConfigError, match="kib does not support float16"):
        check_one_shot_dtype(CONFIG, torch.float16)
    check_one_shot_dtype(CONFIG, torch.bfloat16)
    with pytest.raises(ConfigError, match="only by servers"):
        LLM("demo", tp=2, one_shot_all_reduce_kib=256)


def test_nothing_is_required_where_it_is_off() -> None:
    check_one_shot(ServerConfig(), 0, torch.device("cpu"))
    check_one_shot_dtype(ServerConfig(), torch.float16)
