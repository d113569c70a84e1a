"""A rank above 0 has a share of the vocabulary: what forbids tokens is not for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from minisrv.engine.device_runner import DeviceKernels, DeviceRunner
from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.kernels.torch_native import TorchKernels, mask_logits_
from minisrv.engine.parallel.communicator import SingleRank
from minisrv.engine.parallel.shard import Sharding
from minisrv.engine.sampling.adjust import LogitAdjuster
from minisrv.engine.step_buffer import StepLimits
from tests.support.device_parts import expand, sample_by_torch
from tests.support.step_driver import sampling_columns

SHARE = 5  # of a vocabulary of twice as many


class SecondRank(SingleRank):
    """Gets what rank 0 has drawn."""

    sharding = Sharding(1, 2)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return x.fill_(7)


class Share:
    """A model's and an attention's part of a step, as far as it matters here."""

    def forward(self, ids_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        return ids_T

    def logits(self, x_TC: torch.Tensor, sample_tokens_S: torch.Tensor, out: Any) -> torch.Tensor:
        return torch.zeros(len(sample_tokens_S), SHARE)

    def read_from(self, tensors: Any) -> None:
        pass

    def plan(self, step: Any) -> None:
        pass

    def begin(self) -> None:
        pass


def test_more_suppressed_tokens_than_fit_do_not_reach_its_logits() -> None:
    limits = StepLimits(num_rows=2, num_prefill_tokens=8, max_seq_len=16, page_size=4)
    step: Any = Share()
    kernels = DeviceKernels(expand, sample_by_torch, mask_logits_)
    device = torch.device("cpu")
    adjuster = LogitAdjuster(TorchKernels(), 0, SHARE, device)
    rank = DeviceRunner(step, step, kernels, SecondRank(), limits, adjuster, device)
    one = np.ones(1, np.int32)
    pairs = [(0, i) for i in range(limits.num_biases + 1)]
    batch = ForwardBatch(
        step_id=1,
        num_decodes=0,
        rows=one,
        query_lens=one,
        start_positions=one - 1,
        prefill_ids=one,
        page_rows=one,
        page_columns=one - 1,
        page_ids=one,
        sample_indices=one - 1,
        sampling=sampling_columns(1, suppress=pairs),
    )
    assert len(pairs) > SHARE
    assert rank.compute(batch).token_ids_S.tolist() == [7]
