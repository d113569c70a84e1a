"""Which part of the model a tensor-parallel rank holds (Shoeybi et al., Megatron-LM, 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from minisrv.checkpoint.model_config import ModelConfig
from minisrv.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Cut:
    """The entries start .. start + length along dimension `dim` of a tensor."""

    dim: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Partition:
    """Rank `rank` of `size`: its share of heads, features and vocabulary."""

    rank: int = 0
    size: int = 1

    def even(self, total: int, dim: int) -> Cut:
        """An equal share; `check_divisible` has made sure that there is one."""
        length = total // self.size
        return Cut(dim, self.rank * length, length)

    def vocab(self, vocab_size: int) -> Cut:
        """A share of the vocabulary: sizes differ by at most one."""
        start = self.rank * vocab_size // self.size
        return Cut(0, start, (self.rank + 1) * vocab_size // self.size - start)

    def query_heads(self, config: ModelConfig) -> Cut:
        """The query heads of this rank."""
        return self.even(config.num_heads, 0)

    def kv_heads(self, config: ModelConfig) -> Cut:
        """Its key-value heads: one that several ranks share where there are fewer than ranks."""
        num_heads = config.num_kv_heads
        if num_heads >= self.size:
            return self.even(num_heads, 0)
        return Cut(0, self.rank * num_heads // self.size, 1)


def in_rows(heads: Cut, head_dim: int) -> Cut:
    """A cut of heads as one of the rows that they have in a projection."""
    return Cut(heads.dim, heads.start * head_dim, heads.length * head_dim)


def check_divisible(config: ModelConfig, tp: int) -> None:
    """Raise ConfigError unless the model can be split over `tp` ranks, with the sizes that can."""
    problem = _obstacle(config, tp)
    if problem is None:
        return
    possible = [str(n) for n in range(1, config.num_heads + 1) if _obstacle(config, n) is None]
    raise ConfigError(f"--tp is {tp}; {problem}; this model runs with --tp {', '.join(possible)}")


def _obstacle(config: ModelConfig, tp: int) -> str | None:
    features = {"attention heads": config.num_heads}
    if config.moe is None or len(config.moe.sparse_layers) < config.num_layers:
        features["intermediate features"] = config.intermediate_size
    if config.moe is not None:
        features["intermediate features of an expert"] = config.moe.intermediate_size
    for name, total in features.items():
        if total % tp:
            return f"the model's {total} {name} cannot be split into {tp} equal parts"
    kv_heads = config.num_kv_heads
    if kv_heads % tp and tp % kv_heads:
        return f"the model's {kv_heads} key-value heads cannot be split or shared evenly"
    if config.vocab_size < tp:
        return f"the model's vocabulary has {config.vocab_size} tokens"
    return None
