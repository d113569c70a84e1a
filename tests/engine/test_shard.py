"""Every part of the model is on some rank, and plans arrive as they were sent."""

from __future__ import annotations

import io
from dataclasses import fields, replace

import numpy as np
import pytest

from minisrv.checkpoint.model_config import ModelConfig, MoeConfig, RopeConfig
from minisrv.engine.forward_batch import ForwardBatch
from minisrv.engine.parallel.plan_pipe import encode_plan, read_plans
from minisrv.engine.parallel.shard import Sharding, check_divisible
from minisrv.errors import ConfigError
from tests.support.step_driver import sampling_columns

CONFIG = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=1001,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    max_position=128,
    max_seq_len=128,
    norm_eps=1e-6,
    rope=RopeConfig(),
)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 1001])
def test_the_vocabulary_is_cut_without_gap_or_overlap(size: int) -> None:
    shards = [Sharding(rank, size).vocab(1001) for rank in range(size)]
    rows = [row for shard in shards for row in range(shard.start, shard.start + shard.length)]
    assert rows == list(range(1001))
    assert max(shard.length for shard in shards) == -(-1001 // size)
    assert min(shard.length for shard in shards) >= 1001 // size


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_query_heads_are_on_the_rank_of_their_key_head(size: int) -> None:
    group = CONFIG.num_heads // CONFIG.num_kv_heads
    seen = []
    for rank in range(size):
        sharding = Sharding(rank, size)
        q, kv = sharding.query_heads(CONFIG), sharding.kv_heads(CONFIG)
        local_group = q.length // kv.length
        for i in range(q.length):
            assert (q.start + i) // group == kv.start + i // local_group
            seen.append(q.start + i)
    assert seen == list(range(CONFIG.num_heads))


@pytest.mark.parametrize(
    ("config", "tp", "sentence"),
    [
        (CONFIG, 3, "8 attention heads cannot be split into 3 equal parts; .* --tp 1, 2, 4, 8$"),
        (replace(CONFIG, num_heads=12, num_kv_heads=4), 6, "4 key-value heads cannot be"),
        (replace(CONFIG, intermediate_size=98), 4, "98 intermediate features cannot be split"),
        (replace(CONFIG, vocab_size=3), 4, "vocabulary has 3 tokens"),
        (
            replace(
                CONFIG,
                moe=MoeConfig(
                    num_experts=4,
                    num_experts_per_token=2,
                    intermediate_size=30,
                    norm_topk_prob=True,
                    sparse_layers=frozenset({0}),
                ),
            ),
            4,
            "30 intermediate features of an expert cannot be split",
        ),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(
    config: ModelConfig, tp: int, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_divisible(config, tp)


def test_plans_arrive_as_they_were_sent() -> None:
    rng = np.random.default_rng(0)
    batches = []
    for step_id, size in enumerate((1, 0, 5000)):
        columns = {
            field.name: rng.integers(0, 1000, size, np.int32)
            for field in fields(ForwardBatch)
            if field.name not in ("step_id", "num_decodes", "sampling")
        }
        sampling = sampling_columns(size, temperature=0.7)
        batches.append(
            ForwardBatch(step_id=step_id, num_decodes=size, sampling=sampling, **columns)
        )
    pipe = io.BytesIO(b"".join(encode_plan(batch) for batch in batches))
    for sent, came in zip(batches, read_plans(pipe), strict=True):
        assert (came.step_id, came.num_decodes) == (sent.step_id, sent.num_decodes)
        for one, other in ((sent, came), (sent.sampling, came.sampling)):
            for field in fields(one):
                value = getattr(one, field.name)
                if isinstance(value, np.ndarray):
                    assert getattr(other, field.name).dtype == value.dtype
                    np.testing.assert_array_equal(getattr(other, field.name), value)
