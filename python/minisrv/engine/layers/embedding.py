"""Token ids to hidden states, and hidden states to logits."""

# Shapes: T tokens in the step, V vocabulary, C hidden size.

from __future__ import annotations

from torch import Tensor

from minisrv.engine.layers.linear import Linear
from minisrv.engine.weights import Weights
from minisrv.model_config import ModelConfig

EMBEDDING_NAME = "model.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"


class Embedding:
    """The rows of a table."""

    def __init__(self, weight_VC: Tensor) -> None:
        self._weight = weight_VC

    def __call__(self, ids_T: Tensor) -> Tensor:
        """A new tensor [T, C]."""
        return self._weight.index_select(0, ids_T)


def load_embedding_and_head(weights: Weights, config: ModelConfig) -> tuple[Embedding, Linear]:
    """Both ends of the model; when they are tied, one matrix serves as both."""
    shape = (config.vocab_size, config.hidden_size)
    table = weights.take(EMBEDDING_NAME, shape)
    head = table if config.tie_word_embeddings else weights.take(HEAD_NAME, shape)
    return Embedding(table), Linear(head)
