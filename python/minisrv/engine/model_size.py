"""Sizes derived only from a model's config: parameters of a rank, KV cache, step memory."""

# Sizes are in elements unless the name says bytes.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minisrv.checkpoint.model_config import ModelConfig, MoeConfig
from minisrv.config import ServerConfig
from minisrv.engine.attention.workspace import workspace_bytes
from minisrv.engine.graph_shapes import GraphShape, mixed_shapes
from minisrv.engine.parallel.shard import Sharding

PLAN_BUFFER_BYTES = 8 * 2**20  # FlashInfer's, one each for decodes and prefill chunks
LOGIT_BYTES = 4  # float32
TOKEN_COUNT_BYTES = 2  # int16, per row and token of the vocabulary
GRAPH_NODE_BYTES, GRAPH_NODES = 8 * 2**10, 10  # per kernel in a graph; kernels per layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Parameter counts of one rank. `head` is 0 if it is tied; `experts` covers all sparse layers.

    experts_read: the fraction of `experts` that is used for one token.
    """

    embedding: int
    head: int
    matrices: int
    experts: int
    vectors: int
    experts_read: float = 0.0

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.matrices + self.experts + self.vectors

    @property
    def layer_products(self) -> float:
        """Multiply-adds per token in all layers, without the head."""
        return self.matrices + self.experts * self.experts_read

    @property
    def head_products(self) -> int:
        """Multiply-adds per token in the head, tied or not."""
        return self.head or self.embedding

    @property
    def read_for_a_token(self) -> float:
        """Parameters read to decode one token, without the one row of an untied embedding."""
        return self.layer_products + self.head_products + self.vectors


@dataclass(frozen=True, slots=True)
class _Layer:
    matrices: int = 0
    experts: int = 0
    vectors: int = 0


def count_parameters(config: ModelConfig, sharding: Sharding = Sharding()) -> Parameters:  # noqa: B008
    """The exact parameter counts of one rank."""
    rows = sharding.vocab(config.vocab_size).length
    sparse = frozenset[int]() if config.moe is None else config.moe.sparse_layers
    layers = [
        _feed_forward(config, sharding, config.moe if i in sparse else None)
        for i in range(config.num_layers)
    ]
    attention, moe = _attention(config, sharding), config.moe
    norms = (2 * config.num_layers + 1) * config.hidden_size
    return Parameters(
        embedding=rows * config.hidden_size,
        head=0 if config.tie_word_embeddings else rows * config.hidden_size,
        matrices=config.num_layers * attention.matrices + sum(x.matrices for x in layers),
        experts=sum(x.experts for x in layers),
        vectors=config.num_layers * attention.vectors + sum(x.vectors for x in layers) + norms,
        experts_read=0.0 if moe is None else moe.num_experts_per_token / moe.num_experts,
    )


def kv_bytes_per_token(config: ModelConfig, itemsize: int, sharding: Sharding) -> int:
    """Bytes of one token's keys and values, in all layers of one rank."""
    heads = sharding.kv_heads(config).length
    return 2 * config.num_layers * heads * config.head_dim * itemsize


def token_count_bytes(config: ModelConfig, num_rows: int) -> int:
    """Bytes of the token counts of `num_rows` requests, for their penalties; only on rank 0."""
    return num_rows * config.vocab_size * TOKEN_COUNT_BYTES


def widest_layer(config: ModelConfig, tp: int) -> int:
    """Peak number of live elements per token in a layer."""
    sharding = Sharding(0, tp)
    heads, kv_heads = sharding.query_heads(config).length, sharding.kv_heads(config).length
    attention = (2 * heads + 2 * kv_heads) * config.head_dim
    feed_forward = 3 * config.intermediate_size // tp
    if config.moe is not None:
        # Copies of each token for its experts, the experts' outputs, and these joined.
        feed_forward = 3 * config.moe.num_experts_per_token * config.hidden_size
    return 2 * config.hidden_size + max(attention, feed_forward)


def _attention(config: ModelConfig, sharding: Sharding) -> _Layer:
    width = sharding.query_heads(config).length * config.head_dim
    kv_width = sharding.kv_heads(config).length * config.head_dim
    outputs = width + 2 * kv_width
    biases = outputs * config.qkv_bias + config.hidden_size * config.o_bias
    head_norms = 2 * config.head_dim if config.architecture.startswith("Qwen3") else 0
    return _Layer(config.hidden_size * (outputs + width), 0, biases + head_norms)


def _feed_forward(config: ModelConfig, sharding: Sharding, moe: MoeConfig | None) -> _Layer:
    hidden = config.hidden_size
    if moe is not None:
        features = moe.intermediate_size // sharding.size
        router = moe.num_experts * hidden
        return _Layer(router, moe.num_experts * 3 * hidden * features)
    features = config.intermediate_size // sharding.size
    biases = (2 * features + hidden) if config.mlp_bias else 0
    return _Layer(3 * hidden * features, 0, biases)


def attention_workspace_bytes(
    config: ModelConfig, sharding: Sharding, num_sms: int, largest_graph: int, chunk_tokens: int
) -> int:
    """Bytes that FlashInfer takes on one rank: partial results, and the plans of two wrappers."""
    partial_results = workspace_bytes(
        num_heads=sharding.query_heads(config).length,
        num_kv_heads=sharding.kv_heads(config).length,
        head_dim=config.head_dim,
        num_sms=num_sms,
        largest_graph=largest_graph,
        chunk_tokens=chunk_tokens,
    )
    return partial_results + 2 * PLAN_BUFFER_BYTES


def largest_graph(config: ServerConfig) -> int:
    """Sequences in the largest CUDA graph; 0 without graphs."""
    if config.tp > 1 and not config.cuda_graph_ranks:
        return 0
    return min(config.cuda_graph_max_bs, config.max_running_requests)


def largest_chunk_graph(config: ServerConfig) -> int:
    """Most prompt tokens in a CUDA graph; 0 if steps with prompts run without graphs."""
    return config.cuda_graph_max_tokens if largest_graph(config) else 0


def graph_sizes(largest: int) -> list[int]:
    """Batch sizes to record as CUDA graphs, up to `largest`; a step is padded to the next one."""
    sizes = [size for size in (1, 2, 4, *range(8, largest, 8)) if size < largest]
    return [*sizes, largest] if largest else []


def graph_shapes(
    config: ServerConfig, max_prefill_tokens: int, max_seq_len: int
) -> list[GraphShape]:
    """The shapes of steps to record: decodes by size, then those with chunks by their tokens."""
    decodes = [GraphShape(size) for size in graph_sizes(largest_graph(config))]
    return decodes + mixed_shapes(
        config.cuda_graph_max_tokens,
        largest_graph=largest_graph(config),
        num_rows=config.max_running_requests,
        max_chunk_tokens=min(max_prefill_tokens, max_seq_len),
    )


def graph_bytes(config: ModelConfig, shapes: Sequence[GraphShape], itemsize: int) -> int:
    """Estimated bytes of the graphs: their kernels, and one set of tensors shared by all shapes."""
    if not shapes:
        return 0
    kernels = len(shapes) * config.num_layers * GRAPH_NODES * GRAPH_NODE_BYTES
    hidden = max(shape.num_tokens for shape in shapes) * widest_layer(config, 1) * itemsize
    samples = max(shape.num_sequences for shape in shapes)
    return kernels + hidden + samples * config.vocab_size * LOGIT_BYTES
