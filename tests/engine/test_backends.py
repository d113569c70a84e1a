"""Which operators and which attention a GPU gets, without one: nothing is allocated yet."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

import pytest
import torch

from minisrv.checkpoint.model_config import ModelConfig, RopeConfig
from minisrv.config import ServerConfig
from minisrv.engine.attention.torch_native import TorchNativeAttention
from minisrv.engine.backends import choose_backends
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.kv_pool import KVPool
from minisrv.errors import ConfigError

pytest.importorskip("flashinfer")


def cuda_pool(dtype: torch.dtype, head_dim: int, page_size: int = 16) -> KVPool:
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=10,
        hidden_size=64,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        max_position=128,
        max_seq_len=128,
        norm_eps=1e-6,
        rope=RopeConfig(),
    )
    return KVPool(config, 2, page_size, dtype, torch.device("cuda"))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "torch_kernels", "reason"),
    [
        (torch.float32, 64, True, "torch's attention and operators.*does not support float32$"),
        (torch.float32, 80, True, "torch's attention and operators.*does not support float32$"),
        (torch.bfloat16, 80, False, "torch's attention,.*does not support a head size of 80$"),
    ],
)
def test_what_flashinfer_lacks_falls_back_to_torch_with_one_warning(
    dtype: torch.dtype,
    head_dim: int,
    torch_kernels: bool,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("triton")
    with caplog.at_level(logging.WARNING):
        kernels, attention = choose_backends(ServerConfig(), cuda_pool(dtype, head_dim), 4)
    assert isinstance(attention, TorchNativeAttention)
    assert isinstance(kernels, TorchKernels) == torch_kernels
    assert len(caplog.messages) == 1
    assert re.search(reason, caplog.messages[0])


def test_without_flashinfer_torch_does_all_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    kernels, attention = choose_backends(ServerConfig(), cuda_pool(torch.bfloat16, 64), 4)
    assert isinstance(attention, TorchNativeAttention)
    assert isinstance(kernels, TorchKernels)
    assert len(caplog.messages) == 1
    assert "attention and operators" in caplog.messages[0]


def test_torch_by_choice_gives_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = ServerConfig(attention_backend="torch_native", kernels="torch")
    kernels, attention = choose_backends(config, cuda_pool(torch.float32, 80), 4)
    assert isinstance(attention, TorchNativeAttention)
    assert isinstance(kernels, TorchKernels)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("options", "num_heads", "page_size", "capability", "reason"),
    [
        ({"decode_kernel": "cuda_core"}, 10, 16, (9, 0), "support 5 query heads per key head"),
        ({"decode_kernel": "xqa"}, 66, 16, (9, 0), "support 33 query heads per key head"),
        ({"decode_kernel": "xqa"}, 4, 8, (9, 0), "support a --page-size of 8"),
        ({"decode_kernel": "xqa"}, 4, 16, (8, 9), "support compute capability 8.9"),
        (
            {"decode_kernel": "fa2", "attention_backend": "torch_native"},
            *(4, 16, (9, 0)),
            "--attention-backend is torch_native",
        ),
    ],
)
def test_a_decode_kernel_that_cannot_be_used_is_refused(
    options: dict[str, Any],
    num_heads: int,
    page_size: int,
    capability: tuple[int, int],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    pool = cuda_pool(torch.bfloat16, 64, page_size)
    with pytest.raises(ConfigError, match=f"^--decode-kernel .* cannot be used: .*{reason}$"):
        choose_backends(ServerConfig(**options), pool, num_heads)


def test_a_decode_kernel_of_flashinfer_is_refused_where_that_lacks_the_dtype() -> None:
    with pytest.raises(ConfigError, match=r"xqa cannot be used: .* float32$"):
        choose_backends(ServerConfig(decode_kernel="xqa"), cuda_pool(torch.float32, 64), 4)


def test_a_decode_kernel_requires_a_gpu() -> None:
    pool = cuda_pool(torch.bfloat16, 64)
    pool.device = torch.device("cpu")
    with pytest.raises(ConfigError, match="--decode-kernel fa2 requires a GPU"):
        choose_backends(ServerConfig(decode_kernel="fa2"), pool, 4)
