"""What the ranks of a model say to one another: sums, gathered logits, the tokens of rank 0.

Process groups of torch.distributed, gloo on CPUs and NCCL on GPUs, that meet at a file and use the
loopback interface alone. They are objects of ours, not torch's global group, so that a program may
hold several models.
"""

# Shapes: T tokens, C hidden size, S samples, V vocabulary.

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from minisrv.engine.parallel.shard import Partition

dist: Any = torch.distributed  # what is used of it has no types
TIMEOUT = timedelta(seconds=300)


class Communicator(Protocol):
    """Collective operations: every rank calls the same ones in the same order."""

    partition: Partition

    def sum_(self, x_TC: Tensor) -> Tensor:
        """`x_TC` itself, now the sum over the ranks."""

    def gather_vocab(self, logits: Tensor, vocab_size: int) -> Tensor:
        """The logits [S, V] of all ranks' shares on rank 0; elsewhere what was given."""

    def from_rank_0_(self, x: Tensor) -> Tensor:
        """`x` itself, now with what rank 0 has in it."""

    def minimum(self, value: int) -> int:
        """The least of the ranks' values."""


class NoPeers:
    """See Communicator: one rank alone."""

    partition = Partition()

    def sum_(self, x_TC: Tensor) -> Tensor:
        """See Communicator."""
        return x_TC

    def gather_vocab(self, logits: Tensor, vocab_size: int) -> Tensor:
        """See Communicator."""
        return logits

    def from_rank_0_(self, x: Tensor) -> Tensor:
        """See Communicator."""
        return x

    def minimum(self, value: int) -> int:
        """See Communicator."""
        return value


class Peers:
    """See Communicator: a process group. Constructing it waits for all ranks."""

    def __init__(self, partition: Partition, run_dir: Path, device: torch.device) -> None:
        self.partition, self._device = partition, device
        store = dist.FileStore(str(run_dir / "ranks"), partition.size)
        store.set_timeout(TIMEOUT)
        make = _nccl_group if device.type == "cuda" else _gloo_group
        self._group: Any = make(store, partition)

    def sum_(self, x_TC: Tensor) -> Tensor:
        """See Communicator."""
        self._group.allreduce([x_TC]).wait()
        return x_TC

    def gather_vocab(self, logits: Tensor, vocab_size: int) -> Tensor:
        """See Communicator. Shares are padded to the largest for the way."""
        size = self.partition.size
        padded = torch.nn.functional.pad(logits, (0, -(-vocab_size // size) - logits.shape[1]))
        options = dist.GatherOptions()
        options.rootRank = 0
        if self.partition.rank:
            self._group.gather([], [padded], options).wait()
            return logits
        shares = [torch.empty_like(padded) for _ in range(size)]
        self._group.gather([shares], [padded], options).wait()
        lengths = [Partition(rank, size).vocab(vocab_size).length for rank in range(size)]
        return torch.cat([s[:, :n] for s, n in zip(shares, lengths, strict=True)], 1)

    def from_rank_0_(self, x: Tensor) -> Tensor:
        """See Communicator."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([x], options).wait()
        return x

    def minimum(self, value: int) -> int:
        """See Communicator."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        values = torch.tensor([value], device=self._device)
        self._group.allreduce([values], options).wait()
        return int(values.item())


def _gloo_group(store: Any, partition: Partition) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._timeout = TIMEOUT
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return dist.ProcessGroupGloo(store, partition.rank, partition.size, options)


def _nccl_group(store: Any, partition: Partition) -> Any:
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = TIMEOUT
    return dist.ProcessGroupNCCL(store, partition.rank, partition.size, options)
