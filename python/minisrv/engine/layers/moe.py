"""The sparse feed-forward layer: each token goes through the experts that its router picks."""

# Shapes: T tokens in the step, C hidden size, E experts, N experts a token, F features of an expert
# on this rank, G = 2 F.

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from minisrv.checkpoint.model_config import MoeConfig
from minisrv.engine.kernels.base import ExpertWeights
from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.linear import Projection, load_linear
from minisrv.engine.layers.mlp import PartialMLP

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_TC, scores_TN, experts_TN -> [T, C]


class SparseMoe:
    """x_TC -> the weighted sum of N experts' outputs."""

    def __init__(self, build: BuildContext, name: str, moe: MoeConfig) -> None:
        self._moe, self._peers = moe, build.peers
        self._router = load_linear(
            build.weights, [Projection(f"{name}.gate", moe.num_experts)], build.config.hidden_size
        )
        grouped = build.kernels.run_experts is not None
        make: type[GroupedExperts] | type[SeparateExperts]
        make = GroupedExperts if grouped else SeparateExperts
        self._experts: Experts = make(build, name, moe)

    def __call__(self, x_TC: Tensor) -> Tensor:
        """A new tensor [T, C]."""
        scores_TN, experts_TN = self._route(x_TC)
        return self._peers.sum_(self._experts(x_TC, scores_TN, experts_TN))

    def _route(self, x_TC: Tensor) -> tuple[Tensor, Tensor]:
        probs_TE = self._router(x_TC).softmax(-1, dtype=torch.float32)
        scores_TN, experts_TN = probs_TE.topk(self._moe.num_experts_per_token, -1)
        if self._moe.norm_topk_prob:
            scores_TN = scores_TN / scores_TN.sum(-1, keepdim=True)
        return scores_TN.to(x_TC.dtype), experts_TN


class SeparateExperts:
    """One expert's tokens at a time, this rank's part of the sum over the ranks."""

    def __init__(self, build: BuildContext, name: str, moe: MoeConfig) -> None:
        self._num_experts = moe.num_experts
        self._experts = [
            PartialMLP(build, f"{name}.experts.{i}", moe.intermediate_size)
            for i in range(moe.num_experts)
        ]

    def __call__(self, x_TC: Tensor, scores_TN: Tensor, experts_TN: Tensor) -> Tensor:
        """A new tensor [T, C]."""
        # Pairs of token and expert in the order of the experts: each expert has a slice of them.
        order = experts_TN.flatten().argsort(stable=True)
        tokens = order // experts_TN.shape[1]
        counts = torch.bincount(experts_TN.flatten(), minlength=self._num_experts).tolist()
        pairs = x_TC.index_select(0, tokens)
        outputs = [
            self._experts[i](part)
            for i, part in enumerate(pairs.split_with_sizes(counts))
            if part.shape[0]
        ]
        weighted = torch.cat(outputs).mul_(scores_TN.flatten()[order].unsqueeze(1))
        return torch.zeros_like(x_TC).index_add_(0, tokens, weighted)


class GroupedExperts:
    """All experts in the device's own kernels, their weights stacked; otherwise the same."""

    def __init__(self, build: BuildContext, name: str, moe: MoeConfig) -> None:
        assert build.kernels.run_experts is not None
        self._run, self._weights = build.kernels.run_experts, _load_stacked(build, name, moe)

    def __call__(self, x_TC: Tensor, scores_TN: Tensor, experts_TN: Tensor) -> Tensor:
        """A new tensor [T, C]."""
        return self._run(x_TC.contiguous(), self._weights, scores_TN, experts_TN)


def _load_stacked(build: BuildContext, name: str, moe: MoeConfig) -> ExpertWeights:
    """One expert after the other into its place, so that no second copy of all is held."""
    weights, partition = build.weights, build.peers.partition
    hidden_size, features = build.config.hidden_size, moe.intermediate_size
    rows, columns = partition.even(features, 0), partition.even(features, 1)
    size = rows.length
    empty = partial(torch.empty, dtype=weights.dtype, device=weights.device)
    gate_up_EGC = empty(moe.num_experts, 2 * size, hidden_size)
    down_ECF = empty(moe.num_experts, hidden_size, size)
    for i in range(moe.num_experts):
        expert = f"{name}.experts.{i}"
        for half, part in enumerate(("gate", "up")):
            taken = weights.take(f"{expert}.{part}_proj.weight", (features, hidden_size), rows)
            gate_up_EGC[i, half * size : (half + 1) * size] = taken
        taken = weights.take(f"{expert}.down_proj.weight", (hidden_size, features), columns)
        down_ECF[i] = taken
    return ExpertWeights(gate_up_EGC, down_ECF)
