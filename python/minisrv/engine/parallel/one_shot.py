"""Sums of small tensors over the ranks in one launch, through memory that all their GPUs access.

NCCL's all-reduce sends parts around the ranks, which takes several times as long as the data of a
decode step needs. Here each rank writes its tensor into memory that the others read, waits until
all have done so, and adds up all of them: torch's symmetric memory and its kernel for that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from minisrv.config import ServerConfig
from minisrv.engine.parallel.shard import Sharding
from minisrv.errors import ConfigError

dist: Any = torch.distributed  # the parts used here have no type hints
SymmetricMemory: Any = getattr(torch._C._distributed_c10d, "_SymmetricMemory", None)
_DTYPES = (torch.bfloat16, torch.float32)
_VECTOR_BYTES = 16


class OneShotAllReduce:
    """Constructing it waits for all ranks, which meet in `store` under the same `name`.

    num_bytes: of the largest tensor. The kernel waits for the other ranks without end, even for one
    that has died.
    """

    def __init__(
        self, sharding: Sharding, store: Any, name: str, device: torch.device, num_bytes: int
    ) -> None:
        self._name = name
        group_store = dist.PrefixStore("one_shot", store)
        SymmetricMemory.set_group_info(name, sharding.rank, sharding.size, group_store)
        self._memory = SymmetricMemory.empty_strided_p2p(
            (num_bytes,), (1,), torch.uint8, device, name
        )
        SymmetricMemory.rendezvous(self._memory, name)

    def fits(self, x: Tensor) -> bool:
        """Whether the tensor is small enough and of a kind that the kernel supports."""
        return (
            x.nbytes <= self._memory.nbytes
            and x.nbytes % _VECTOR_BYTES == 0
            and x.dtype in _DTYPES
            and x.is_contiguous()
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The sum, in a new tensor."""
        memory = self._memory[: x.nbytes].view(x.dtype).view(x.shape)
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(memory, x, "sum", self._name)
        return total


def check_one_shot(config: ServerConfig, rank: int, device: torch.device) -> None:
    """Raise ConfigError if --one-shot-all-reduce-kib is given and cannot be used by the ranks."""
    if not config.one_shot_all_reduce_kib:
        return
    others = [other for other in range(config.tp) if other != rank]
    if not others:
        raise _refusal("requires several ranks, and --tp is 1")
    if device.type != "cuda":
        raise _refusal("requires GPUs, but the device is a CPU")
    if SymmetricMemory is None:
        raise _refusal(f"requires symmetric memory, which torch {torch.__version__} does not have")
    for other in others:
        if not torch.cuda.can_device_access_peer(rank, other):
            raise _refusal(f"requires that GPU {rank} can access the memory of GPU {other}")


def check_one_shot_dtype(config: ServerConfig, dtype: torch.dtype) -> None:
    """Raise ConfigError if --one-shot-all-reduce-kib is given and the kernel lacks the dtype."""
    if config.one_shot_all_reduce_kib and dtype not in _DTYPES:
        raise _refusal(f"does not support {str(dtype).removeprefix('torch.')}")


def _refusal(reason: str) -> ConfigError:
    return ConfigError(f"--one-shot-all-reduce-kib {reason}")
