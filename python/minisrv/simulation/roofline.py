"""The time of a step on a named GPU, from the shape of a model and data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from minisrv.checkpoint.model_config import ModelConfig
from minisrv.engine.gpus import GPU
from minisrv.engine.model_size import Parameters, count_parameters, kv_bytes_per_token
from minisrv.engine.parallel.shard import Sharding
from minisrv.simulation.step_times import StepWork

# What a copy and a large product reach of the data sheet's rates: measured on an H200, 4.3 of
# 4.8 TB/s and 790 of 989 TFLOP/s, and taken for the others.
_REACHED_BANDWIDTH, _REACHED_FLOPS = 0.9, 0.8
# Of the scheduler, from benchmark/results/host_step_2026-11-25.md.
_HOST_S, _HOST_S_PER_SEQUENCE, _HOST_S_OF_PROMPTS = 50e-6, 1e-6, 130e-6
_SUM_S = 10e-6  # assumed for the start of a sum over ranks


@dataclass(frozen=True, slots=True)
class Roofline:
    """A step takes the longer of reading the weights and multiplying with them, then attention,
    activations and the sums over ranks; all of that divided by `efficiency`.

    itemsize, cache_itemsize: bytes of a weight or activation, and of a value in the KV cache.
    efficiency: the share of these rates that the engine reaches.
    """

    gpu: GPU
    efficiency: float
    bandwidth: float
    flops: float
    parameters: Parameters
    itemsize: int
    kv_bytes: int
    attention_flops: int  # of one query and one key
    token_bytes: float  # activations of a token, written and read
    logit_bytes: float
    sums: int  # over ranks, in a step
    sum_s_per_token: float

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        gpu: GPU,
        *,
        tp: int = 1,
        itemsize: int = 2,
        cache_itemsize: int = 2,
        efficiency: float = 1.0,
    ) -> Roofline:
        """The roofline of one rank of `tp`, all of which are such GPUs."""
        sharding = Sharding(tp - 1, tp)
        width = sharding.query_heads(model).length * model.head_dim
        passed = 2 * (tp - 1) / tp * model.hidden_size * itemsize  # bytes of a token in one sum
        sums = 2 * model.num_layers if tp > 1 else 0
        return cls(
            gpu=gpu,
            efficiency=efficiency,
            bandwidth=gpu.bandwidth * _REACHED_BANDWIDTH,
            flops=gpu.flops * _REACHED_FLOPS,
            parameters=count_parameters(model, sharding),
            itemsize=itemsize,
            kv_bytes=kv_bytes_per_token(model, cache_itemsize, sharding),
            attention_flops=4 * model.num_layers * width,
            token_bytes=2 * itemsize * _activations(model, sharding),
            logit_bytes=2 * itemsize * sharding.vocab(model.vocab_size).length,
            sums=sums,
            sum_s_per_token=sums * passed / gpu.link,
        )

    def host_s(self, work: StepWork) -> float:
        """See StepTimes."""
        sequences = work.decodes + work.chunks
        return _HOST_S + _HOST_S_PER_SEQUENCE * sequences + _HOST_S_OF_PROMPTS * bool(work.chunks)

    def device_s(self, work: StepWork) -> float:
        """See StepTimes."""
        tokens, size = work.decodes + work.prefill_tokens, self.parameters
        touched = 1 - (1 - size.experts_read) ** tokens  # of the experts, if chosen evenly
        read = size.matrices + size.vectors + size.head_products + size.experts * touched
        products = 2 * (size.layer_products * tokens + size.head_products * work.samples)
        seconds = max(read * self.itemsize / self.bandwidth, products / self.flops)
        moved: float = work.decode_context * self.kv_bytes
        moved += tokens * self.token_bytes + work.samples * self.logit_bytes
        seconds += moved / self.bandwidth + work.prefill_pairs * self.attention_flops / self.flops
        seconds += self.sums * _SUM_S + tokens * self.sum_s_per_token
        return seconds / self.efficiency


def _activations(model: ModelConfig, sharding: Sharding) -> float:
    """Elements that the operators of one rank write for a token, without the logits."""
    hidden, heads = model.hidden_size, sharding.query_heads(model).length
    kv_heads, features, experts = sharding.kv_heads(model).length, model.intermediate_size, 1
    if model.moe is not None:
        features, experts = model.moe.intermediate_size, model.moe.num_experts_per_token
    attention = (2 * heads + 2 * kv_heads) * model.head_dim + hidden
    return model.num_layers * (attention + experts * (3 * features / sharding.size + hidden))
