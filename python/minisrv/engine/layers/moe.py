"""The sparse feed-forward layer: a router selects the experts for each token."""

# Shapes: T tokens in the step, C hidden size, E experts, N experts per token, F features of an
# expert on this rank, G = 2 F.

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from minisrv.checkpoint.model_config import MoeConfig
from minisrv.engine.kernels.base import ExpertWeights, NormWeight
from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.linear import Projection, has_joined, load_linear
from minisrv.engine.layers.mlp import PartialMLP

# x_TC, scores_TN, experts_TN -> [T, C], or [T, N, C] still to be summed over the experts.
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


class SparseMoe:
    """x_TC -> the weighted sum of N experts' outputs, as a `delta` of Kernels.add_rms_norm_."""

    def __init__(self, build: BuildContext, name: str, moe: MoeConfig) -> None:
        self._moe, self._kernels, self._communicator = moe, build.kernels, build.communicator
        self._router = load_linear(
            build.weights,
            build.kernels,
            [Projection(f"{name}.gate", moe.num_experts)],
            build.config.hidden_size,
        )
        grouped = build.kernels.run_experts is not None
        make: type[GroupedExperts] | type[SeparateExperts]
        make = GroupedExperts if grouped else SeparateExperts
        self._experts: Experts = make(build, name, moe)

    def __call__(self, x_TC: Tensor) -> Tensor:
        scores_TN, experts_TN = self._kernels.route(
            self._router(x_TC), self._moe.num_experts_per_token, self._moe.norm_topk_prob
        )
        delta = self._experts(x_TC, scores_TN, experts_TN)
        if self._communicator.sharding.size > 1 and delta.dim() == 3:
            delta = delta.sum(1)
        return self._communicator.all_reduce(delta)

    def joined(self, norm: NormWeight) -> Callable[[Tensor], None] | None:
        """For a few tokens: adds the result for the normed x_TC to x_TC in place.

        None if the kernels do not have it, or for several ranks.
        """
        small, router, experts = self._kernels.small_batch, self._router, self._experts
        if small is None or self._communicator.sharding.size > 1:
            return None
        if not (isinstance(experts, GroupedExperts) and has_joined(router, small)):
            return None
        weights, moe = experts.weights, self._moe

        def add(x_TC: Tensor) -> None:
            small.add_experts_(
                x_TC, norm, router, weights, moe.num_experts_per_token, moe.norm_topk_prob
            )

        return add


class SeparateExperts:
    """Computes one expert at a time, over this rank's features, before all_reduce."""

    def __init__(self, build: BuildContext, name: str, moe: MoeConfig) -> None:
        self._num_experts = moe.num_experts
        self._experts = [
            PartialMLP(build, f"{name}.experts.{i}", moe.intermediate_size)
            for i in range(moe.num_experts)
        ]

    def __call__(self, x_TC: Tensor, scores_TN: Tensor, experts_TN: Tensor) -> Tensor:
        # (token, expert) pairs sorted by expert, so that each expert has a contiguous slice.
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
    """All experts in one kernel of the device, with stacked weights; their outputs unsummed."""

    def __init__(self, build: BuildContext, name: str, moe: MoeConfig) -> None:
        assert build.kernels.run_experts is not None
        self._run, self.weights = build.kernels.run_experts, _load_stacked(build, name, moe)

    def __call__(self, x_TC: Tensor, scores_TN: Tensor, experts_TN: Tensor) -> Tensor:
        return self._run(x_TC.contiguous(), self.weights, scores_TN, experts_TN)


def _load_stacked(build: BuildContext, name: str, moe: MoeConfig) -> ExpertWeights:
    """Loads each expert into its place, so that there is never a second copy of all weights."""
    weights, sharding = build.weights, build.communicator.sharding
    hidden_size, features = build.config.hidden_size, moe.intermediate_size
    rows, columns = sharding.even_shard(features, 0), sharding.even_shard(features, 1)
    size = rows.length
    empty = partial(torch.empty, dtype=weights.dtype, device=weights.device)
    gate_up_EGC = empty(moe.num_experts, 2 * size, hidden_size)
    down_ECF = empty(moe.num_experts, hidden_size, size)
    for i in range(moe.num_experts):
        expert = f"{name}.experts.{i}"
        for half, part in enumerate(("gate", "up")):
            taken = weights.load_tensor(
                f"{expert}.{part}_proj.weight", (features, hidden_size), rows
            )
            gate_up_EGC[i, half * size : (half + 1) * size] = taken
        taken = weights.load_tensor(f"{expert}.down_proj.weight", (hidden_size, features), columns)
        down_ECF[i] = taken
    return ExpertWeights(gate_up_EGC, down_ECF)
