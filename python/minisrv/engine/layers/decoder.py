"""The decoder that all models share: embedding, residual blocks, norm, head."""

# Shapes: T tokens in the step, S tokens that sample, C hidden size, V vocabulary.

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from minisrv.engine.kernels.base import DenseLayer, NormWeight, RopeRows
from minisrv.engine.layers.attention import SelfAttention
from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.embedding import load_embedding_and_head
from minisrv.engine.layers.mlp import GatedMLP
from minisrv.engine.layers.norm import RMSNorm


class FeedForward(Protocol):
    """x_TC -> a delta of Kernels.add_rms_norm_."""

    def __call__(self, x_TC: Tensor, /) -> Tensor: ...

    def joined(self, norm: NormWeight) -> Callable[[Tensor], None] | None:
        """For a few tokens: adds the result for the normed x_TC to x_TC in place.

        None if the kernels do not have it, or for several ranks.
        """


class Block:
    """One layer: attention, then feed-forward, each with a norm before it and a residual addition.

    The last addition is done by the next layer's norm, which fuses the two.
    """

    def __init__(
        self,
        build: BuildContext,
        name: str,
        attention: SelfAttention,
        feed_forward: FeedForward,
    ) -> None:
        self._input_norm = RMSNorm(build, f"{name}.input_layernorm")
        self._post_norm = RMSNorm(build, f"{name}.post_attention_layernorm")
        self._attention, self._feed_forward = attention, feed_forward

    def __call__(self, x_TC: Tensor, delta: Tensor | None, rope_rows: RopeRows) -> Tensor:
        """Add `delta` and the attention to `x_TC` in place; return the delta still to add.

        A delta is one of Kernels.add_rms_norm_.
        """
        attention_TC = self._attention(self._input_norm(x_TC, delta), rope_rows)
        return self._feed_forward(self._post_norm(x_TC, attention_TC))

    def joined(self) -> Callable[[Tensor, RopeRows], None] | None:
        """The layer in joined kernels for a few tokens, which changes them in place, if it can."""
        add_attention = self._attention.joined(self._input_norm.weight)
        add_feed_forward = self._feed_forward.joined(self._post_norm.weight)
        if add_attention is None or add_feed_forward is None:
            return None

        def run(x_TC: Tensor, rope_rows: RopeRows) -> None:
            add_attention(x_TC, rope_rows)
            add_feed_forward(x_TC)

        return run

    def dense(self) -> DenseLayer | None:
        """The weights of the layer, unless it is a sparse one."""
        if not isinstance(self._feed_forward, GatedMLP):
            return None
        qkv, heads, qk_norm, out = self._attention.dense_parts()
        mlp = self._feed_forward.partial
        return DenseLayer(
            input_norm=self._input_norm.weight,
            qkv=qkv,
            heads=heads,
            qk_norm=qk_norm,
            out=out,
            post_norm=self._post_norm.weight,
            gate_up=mlp.gate_up,
            down=mlp.down,
            intermediate_size=mlp.intermediate_size,
        )


# x_TC, rope_rows -> whether all layers of the step were computed, with the result in x_TC. If not,
# x_TC is unchanged.
RunLayers = Callable[[Tensor, RopeRows], bool]


class Decoder:
    """Token ids to hidden states, and hidden states of the tokens that sample to logits.

    `block(build, name, layer_id)` creates one layer, which is where models differ.
    """

    def __init__(
        self, build: BuildContext, block: Callable[[BuildContext, str, int], Block]
    ) -> None:
        config = build.config
        self.vocab_size = config.vocab_size
        self._rope, self._communicator = build.rope, build.communicator
        self._embedding, self._head = load_embedding_and_head(build)
        self._blocks = [block(build, f"model.layers.{i}", i) for i in range(config.num_layers)]
        self._norm = RMSNorm(build, "model.norm")
        self._small_batch = build.kernels.small_batch
        joined = [block.joined() for block in self._blocks]
        self._joined = [run for run in joined if run is not None]
        self.run_layers: RunLayers | None = None

    def shorten(self, num_positions: int) -> None:
        """Free what only sequences with more tokens than `num_positions` need."""
        self._rope.shorten(num_positions)

    def forward(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """Hidden states [T, C] after the last layer, before the last norm."""
        x_TC = self._embedding(ids_T)
        rope_rows = self._rope.rows(positions_T)
        if self._uses_joined(x_TC.shape[0]):
            for run in self._joined:
                run(x_TC, rope_rows)
            return x_TC
        if self.run_layers is not None and self.run_layers(x_TC, rope_rows):
            return x_TC
        delta = None
        for block in self._blocks:
            delta = block(x_TC, delta, rope_rows)
        if delta is None:
            return x_TC
        return x_TC.add_(delta if delta.dim() == 2 else delta.sum(1))

    def dense_layers(self) -> list[DenseLayer] | None:
        """The weights of all layers; None for several ranks, or if some layers are sparse."""
        if self._communicator.sharding.size > 1:
            return None
        found = [block.dense() for block in self._blocks]
        layers = [layer for layer in found if layer is not None]
        return layers if len(layers) == len(found) else None

    def _uses_joined(self, num_tokens: int) -> bool:
        """Whether every layer has kernels for this few tokens."""
        return (
            self._small_batch is not None
            and num_tokens <= self._small_batch.most_tokens
            and len(self._joined) == len(self._blocks)
        )

    def logits(self, x_TC: Tensor, sample_tokens_S: Tensor, out_SV: Tensor | None = None) -> Tensor:
        """float32 logits [S, V] of the tokens at indices `sample_tokens_S`.

        out_SV: where they are written. Ranks above 0 return only their shard of the vocabulary.
        """
        if not sample_tokens_S.numel():
            return x_TC.new_empty(0, self.vocab_size, dtype=torch.float32)
        whole_SV = out_SV if self._communicator.sharding.size == 1 else None
        logits = self._head(self._norm(x_TC.index_select(0, sample_tokens_S)), whole_SV)
        return self._communicator.gather_logits(logits, self.vocab_size, out_SV)
