"""Token ids to hidden states, and hidden states to logits."""

# Shapes: T tokens in the step, V vocabulary, C hidden size.

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from minisrv.checkpoint.own_head import EMBEDDING_NAME, HEAD_NAME
from minisrv.engine.fp8 import Fp8Matrix
from minisrv.engine.kernels.base import Float32Product, PackedProduct
from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.linear import as_float32_product, make_float32_product
from minisrv.engine.layers.packed_linear import make_packed_product
from minisrv.engine.parallel.communicator import Communicator
from minisrv.engine.parallel.shard import Shard

logger = logging.getLogger("minisrv.engine")


class Embedding:
    """ids_T -> a new tensor [T, C].

    `rows` returns rows of this rank's shard, which has the `num_rows` tokens from `start` on.
    """

    def __init__(
        self,
        rows: Callable[[Tensor], Tensor],
        num_rows: int,
        start: int,
        communicator: Communicator,
    ) -> None:
        self._rows, self._num_rows, self._start = rows, num_rows, start
        self._communicator = communicator

    def __call__(self, ids_T: Tensor) -> Tensor:
        if self._communicator.sharding.size == 1:
            return self._rows(ids_T)
        rows_T = ids_T - self._start
        elsewhere_T = (rows_T < 0) | (rows_T >= self._num_rows)
        x_TC = self._rows(rows_T.clamp_(0, self._num_rows - 1))
        return self._communicator.all_reduce(x_TC.masked_fill_(elsewhere_T.unsqueeze(1), 0.0))


def load_embedding_and_head(build: BuildContext) -> tuple[Embedding, Float32Product]:
    """Both ends of the model. The head returns float32, since bfloat16 rounds the best to ties."""
    config, weights, communicator = build.config, build.weights, build.communicator
    shape, shard = (config.vocab_size, config.hidden_size), None
    if communicator.sharding.size > 1:
        shard = communicator.sharding.vocab(config.vocab_size)
    tied = config.tie_word_embeddings
    if tied and weights.has_own(HEAD_NAME, EMBEDDING_NAME):
        tied = False
        logger.warning(
            "config.json ties %s to %s, but the checkpoint has both; each is used as it is",
            HEAD_NAME,
            EMBEDDING_NAME,
        )
    table = _load(build, EMBEDDING_NAME, shape, shard)
    head = table if tied else _load(build, HEAD_NAME, shape, shard)
    if isinstance(table, Tensor):
        rows: Callable[[Tensor], Tensor] = partial(table.index_select, 0)
    else:
        rows = partial(table.rows, dtype=weights.dtype)
    num_rows, start = (shard.length, shard.start) if shard else (config.vocab_size, 0)
    embedding = Embedding(rows, num_rows, start, communicator)
    if isinstance(head, Tensor):
        return embedding, make_float32_product(build.kernels, head)
    return embedding, as_float32_product(head)


def _load(
    build: BuildContext, name: str, shape: Sequence[int], shard: Shard | None
) -> Tensor | PackedProduct:
    """The matrix, or if it stays packed its product in float32, which has its rows, too."""
    if not build.weights.packs:
        return build.weights.load_tensor(name, shape, shard)
    matrix = build.weights.load_matrix(name, shape, shard)
    if isinstance(matrix, Tensor):
        return matrix
    assert not isinstance(matrix, Fp8Matrix)
    return make_packed_product(build.kernels, matrix, None, torch.float32)
