"""Which shard of each weight a tensor-parallel rank holds (Shoeybi et al., Megatron-LM, 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from minisrv.checkpoint.model_config import ModelConfig
from minisrv.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shard:
    """The entries start .. start + length along dimension `dim` of a tensor."""

    dim: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Sharding:
    """Rank `rank` of `size`: which heads, features and vocabulary entries it holds."""

    rank: int = 0
    size: int = 1

    def even_shard(self, total: int, dim: int) -> Shard:
        """One of `size` equal shards; `check_divisible` has ensured that `total` divides."""
        length = total // self.size
        return Shard(dim, self.rank * length, length)

    def vocab(self, vocab_size: int) -> Shard:
        """A shard of the vocabulary; sizes differ by at most one."""
        start = self.rank * vocab_size // self.size
        return Shard(0, start, (self.rank + 1) * vocab_size // self.size - start)

    def query_heads(self, config: ModelConfig) -> Shard:
        """The query heads of this rank."""
        return self.even_shard(config.num_heads, 0)

    def kv_heads(self, config: ModelConfig) -> Shard:
        """The key-value heads of this rank. With fewer heads than ranks, several share one."""
        num_heads = config.num_kv_heads
        if num_heads >= self.size:
            return self.even_shard(num_heads, 0)
        return Shard(0, self.rank * num_heads // self.size, 1)


def rows_of_heads(heads: Shard, head_dim: int) -> Shard:
    """The rows of a projection that belong to a shard of heads."""
    return Shard(heads.dim, heads.start * head_dim, heads.length * head_dim)


def check_divisible(config: ModelConfig, tp: int) -> None:
    """Raise ConfigError, listing the sizes that work, if the model cannot be split `tp` ways."""
    problem = _obstacle(config, tp)
    if problem is None:
        return
    possible = [str(n) for n in range(1, config.num_heads + 1) if _obstacle(config, n) is None]
    raise ConfigError(f"--tp is {tp}; {problem}; this model supports --tp {', '.join(possible)}")


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
