"""Collective operations between the ranks of a model.

The process groups are torch.distributed's: gloo on CPUs, NCCL on GPUs. Ranks rendezvous through a
file and use only the loopback interface. We do not use torch's global group, so that one program
can hold several models. NCCL's operations are queued in the current stream: on a stream of its own,
as is the default, each would wait for two events.
"""

# Shapes: T tokens, C hidden size, S samples, V vocabulary.

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from minisrv.engine.parallel.one_shot import OneShotAllReduce
from minisrv.engine.parallel.shard import Sharding

dist: Any = torch.distributed  # the parts used here have no type hints
TIMEOUT = timedelta(seconds=300)


class PeerFailedError(RuntimeError):
    """Another rank has failed. Its own error says why; rank 0 reports that and ends all ranks."""


class Communicator(Protocol):
    """Every rank must call the same operations in the same order."""

    sharding: Sharding

    def all_reduce(self, x_TC: Tensor) -> Tensor:
        """The sum over the ranks: `x_TC` itself, changed in place, or a new tensor."""

    def gather_logits(
        self, logits: Tensor, vocab_size: int, out_SV: Tensor | None = None
    ) -> Tensor:
        """On rank 0 the full logits [S, V] from all shards; on other ranks the input itself.

        out_SV: where several ranks' are written, on rank 0.
        """

    def broadcast(self, x: Tensor) -> Tensor:
        """Overwrite `x` with rank 0's values, in place; returns it."""

    def all_reduce_min(self, value: int) -> int:
        """The smallest of the ranks' values."""


class SingleRank:
    """The Communicator of a model on a single rank: every operation is the identity."""

    sharding = Sharding()

    def all_reduce(self, x_TC: Tensor) -> Tensor:
        return x_TC

    def gather_logits(
        self, logits: Tensor, vocab_size: int, out_SV: Tensor | None = None
    ) -> Tensor:
        return logits

    def broadcast(self, x: Tensor) -> Tensor:
        return x

    def all_reduce_min(self, value: int) -> int:
        return value


class TPGroup:
    """A Communicator over a process group. Constructing it waits for all ranks.

    one_shot_kib: size of the largest tensors that `OneShotAllReduce` sums; 0 for none.
    After `abort` every operation raises RuntimeError.
    """

    def __init__(
        self, sharding: Sharding, run_dir: Path, device: torch.device, one_shot_kib: int = 0
    ) -> None:
        self.sharding, self._device = sharding, device
        store = dist.FileStore(str(run_dir / "ranks"), sharding.size)
        store.set_timeout(TIMEOUT)
        make = _nccl_group if device.type == "cuda" else _gloo_group
        self._group: Any = make(store, sharding)
        self._aborted = False
        self.all_reduce_min(0)  # NCCL connects at the first operation
        self._one_shot: OneShotAllReduce | None = None
        if one_shot_kib:
            name = f"minisrv-{run_dir.name}"  # of this start only
            self._one_shot = OneShotAllReduce(sharding, store, name, device, one_shot_kib * 2**10)

    def all_reduce(self, x_TC: Tensor) -> Tensor:
        if self._one_shot is not None and self._one_shot.fits(x_TC):
            self._require_alive()
            return self._one_shot(x_TC)
        self._run(self._group.allreduce, [x_TC], options=dist.AllreduceOptions())
        return x_TC

    def gather_logits(
        self, logits: Tensor, vocab_size: int, out_SV: Tensor | None = None
    ) -> Tensor:
        # Shards differ by one entry at most; they travel padded to the largest.
        size = self.sharding.size
        padded = torch.nn.functional.pad(logits, (0, -(-vocab_size // size) - logits.shape[1]))
        options = dist.GatherOptions()
        options.rootRank = 0
        if self.sharding.rank:
            self._run(self._group.gather, [], [padded], options=options)
            return logits
        shards = [torch.empty_like(padded) for _ in range(size)]
        self._run(self._group.gather, [shards], [padded], options=options)
        lengths = [Sharding(rank, size).vocab(vocab_size).length for rank in range(size)]
        parts = [shard[:, :length] for shard, length in zip(shards, lengths, strict=True)]
        return torch.cat(parts, 1, out=out_SV)

    def broadcast(self, x: Tensor) -> Tensor:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._run(self._group.broadcast, [x], options=options)
        return x

    def all_reduce_min(self, value: int) -> int:
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        values = torch.tensor([value], device=self._device)
        self._run(self._group.allreduce, [values], options=options)
        return int(values.item())

    def abort(self) -> None:
        """End the operations in flight, whose results are then undefined. For any thread.

        When a rank dies, gloo's operations fail by themselves, but a kernel of NCCL waits for it.
        """
        self._aborted = True
        if self._device.type == "cuda":
            self._group.abort()

    def _require_alive(self) -> None:
        if self._aborted:
            raise RuntimeError("a rank has died, and the others no longer exchange anything")

    def _run(self, operation: Callable[..., Any], *tensors: Any, options: Any) -> None:
        self._require_alive()
        options.asyncOp = False
        work = operation(*tensors, options)
        if work is not None:  # NCCL returns none for an operation in the current stream
            work.wait()


def _gloo_group(store: Any, sharding: Sharding) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._timeout = TIMEOUT
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return dist.ProcessGroupGloo(store, sharding.rank, sharding.size, options)


def _nccl_group(store: Any, sharding: Sharding) -> Any:
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = TIMEOUT
    return dist.ProcessGroupNCCL(store, sharding.rank, sharding.size, options)
