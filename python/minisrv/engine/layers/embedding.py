"""Token ids to hidden states, and hidden states to logits."""

# Shapes: T tokens in the step, V vocabulary, C hidden size.

from __future__ import annotations

from torch import Tensor

from minisrv.engine.layers.build_context import BuildContext
from minisrv.engine.layers.linear import Linear
from minisrv.engine.parallel.communicator import Communicator

EMBEDDING_NAME = "model.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"


class Embedding:
    """The rows of a table, of which this rank has those from `start` on."""

    def __init__(self, weight_VC: Tensor, start: int, peers: Communicator) -> None:
        self._weight, self._start, self._peers = weight_VC, start, peers

    def __call__(self, ids_T: Tensor) -> Tensor:
        """A new tensor [T, C]."""
        if self._peers.partition.size == 1:
            return self._weight.index_select(0, ids_T)
        num_rows = self._weight.shape[0]
        rows_T = ids_T - self._start
        elsewhere_T = (rows_T < 0) | (rows_T >= num_rows)
        x_TC = self._weight.index_select(0, rows_T.clamp_(0, num_rows - 1))
        return self._peers.sum_(x_TC.masked_fill_(elsewhere_T.unsqueeze(1), 0.0))


def load_embedding_and_head(build: BuildContext) -> tuple[Embedding, Linear]:
    """Both ends of the model; when they are tied, one matrix serves as both."""
    config, weights, peers = build.config, build.weights, build.peers
    shape, cut = (config.vocab_size, config.hidden_size), None
    if peers.partition.size > 1:
        cut = peers.partition.vocab(config.vocab_size)
    table = weights.take(EMBEDDING_NAME, shape, cut)
    head = table if config.tie_word_embeddings else weights.take(HEAD_NAME, shape, cut)
    return Embedding(table, cut.start if cut else 0, peers), Linear(head)
