"""Token ids to hidden states, and hidden states to logits."""

# Shapes: T tokens in the step, V vocabulary, C hidden size.

from __future__ import annotations

import logging

from torch import Tensor

from minisrv.checkpoint.own_head import EMBEDDING_NAME, HEAD_NAME
from minisrv.engine.kernels.base import Float32Product
from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.linear import make_float32_product
from minisrv.engine.parallel.communicator import Communicator

logger = logging.getLogger("minisrv.engine")


class Embedding:
    """ids_T -> a new tensor [T, C]. `weight_VC` is this rank's shard: the rows from `start` on."""

    def __init__(self, weight_VC: Tensor, start: int, communicator: Communicator) -> None:
        self._weight, self._start, self._communicator = weight_VC, start, communicator

    def __call__(self, ids_T: Tensor) -> Tensor:
        if self._communicator.sharding.size == 1:
            return self._weight.index_select(0, ids_T)
        num_rows = self._weight.shape[0]
        rows_T = ids_T - self._start
        elsewhere_T = (rows_T < 0) | (rows_T >= num_rows)
        x_TC = self._weight.index_select(0, rows_T.clamp_(0, num_rows - 1))
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
    table = weights.load_tensor(EMBEDDING_NAME, shape, shard)
    head = table if tied else weights.load_tensor(HEAD_NAME, shape, shard)
    embedding = Embedding(table, shard.start if shard else 0, communicator)
    return embedding, make_float32_product(build.kernels, head)
