"""The sparse feed-forward layer: each token goes through the experts that its router picks."""

# Shapes: T tokens in the step, C hidden size, E experts, N experts a token.

from __future__ import annotations

import torch
from torch import Tensor

from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.linear import Projection, load_linear
from minisrv.engine.layers.mlp import PartialMLP
from minisrv.model_config import MoeConfig


class SparseMoe:
    """x_TC -> the weighted sum of N experts' outputs, one expert's tokens at a time."""

    def __init__(self, build: BuildContext, name: str, moe: MoeConfig) -> None:
        self._moe, self._peers = moe, build.peers
        self._router = load_linear(
            build.weights, [Projection(f"{name}.gate", moe.num_experts)], build.config.hidden_size
        )
        self._experts = [
            PartialMLP(build, f"{name}.experts.{i}", moe.intermediate_size)
            for i in range(moe.num_experts)
        ]

    def __call__(self, x_TC: Tensor) -> Tensor:
        """A new tensor [T, C]."""
        scores_TN, experts_TN = self._route(x_TC)
        # Pairs of token and expert in the order of the experts: each expert has a slice of them.
        order = experts_TN.flatten().argsort(stable=True)
        tokens = order // self._moe.num_experts_per_token
        counts = torch.bincount(experts_TN.flatten(), minlength=self._moe.num_experts).tolist()
        pairs = x_TC.index_select(0, tokens)
        outputs = [
            self._experts[i](part)
            for i, part in enumerate(pairs.split_with_sizes(counts))
            if part.shape[0]
        ]
        weighted = torch.cat(outputs).mul_(scores_TN.flatten()[order].unsqueeze(1))
        return self._peers.sum_(torch.zeros_like(x_TC).index_add_(0, tokens, weighted))

    def _route(self, x_TC: Tensor) -> tuple[Tensor, Tensor]:
        probs_TE = self._router(x_TC).softmax(-1, dtype=torch.float32)
        scores_TN, experts_TN = probs_TE.topk(self._moe.num_experts_per_token, -1)
        if self._moe.norm_topk_prob:
            scores_TN = scores_TN / scores_TN.sum(-1, keepdim=True)
        return scores_TN.to(x_TC.dtype), experts_TN
