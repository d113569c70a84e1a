"""Greedy tokens from transformers, and the same prompts through our whole offline path."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from minisrv.config import ServerConfig
from minisrv.sampling_params import SamplingParams
from minisrv.scheduler.build import build_loop
from minisrv.scheduler.channel import LocalChannel
from minisrv.scheduler.loop import SchedulerLoop
from minisrv.start_progress import no_progress
from minisrv.wire.messages import Finish, GenerateMsg

NEW_TOKENS = 32
TIE_MARGIN = 1e-3
GREEDY = SamplingParams(
    temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=NEW_TOKENS, ignore_eos=True
)


@dataclass(frozen=True)
class Way:
    """One way to serve the same prompts."""

    radix_cache: bool
    page_size: int
    budget: int
    at_once: int
    overlap_depth: int
    kernels: Literal["auto", "torch"]

    def __str__(self) -> str:
        radix = "radix" if self.radix_cache else "no-radix"
        sizes = f"page{self.page_size}-budget{self.budget}-{self.at_once}"
        return f"{radix}-{sizes}-depth{self.overlap_depth}-{self.kernels}"


def _rope(rope_type: str, **fields: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **fields}}


CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"max_shard_size": "100KB"}),
    "llama-llama3-tied": (
        "llama",
        {
            "tie_word_embeddings": True,
            **_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=256,
            ),
        },
    ),
    "llama-linear": ("llama", _rope("linear", factor=2.0)),
    "mistral": ("mistral", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-yarn": (
        "qwen3",
        _rope("yarn", factor=4.0, original_max_position_embeddings=512),
    ),
    "qwen3-moe": ("qwen3_moe", {"max_shard_size": "100KB"}),
}

EVERY_WAY = [
    Way(*values)
    for values in itertools.product(
        [True, False], [1, 16], [16, 64, 1024], [1, 32], [0, 1], ["auto", "torch"]
    )
]
# Every pair of values of two options occurs in one of these rows (asserted in the tests).
PAIRWISE = [
    Way(True, 1, 16, 1, 0, "auto"),
    Way(False, 16, 16, 32, 1, "torch"),
    Way(True, 16, 64, 32, 0, "auto"),
    Way(False, 1, 64, 1, 1, "torch"),
    Way(True, 1, 1024, 32, 1, "auto"),
    Way(False, 16, 1024, 1, 0, "torch"),
    Way(True, 1, 64, 32, 0, "torch"),
    Way(False, 16, 1024, 1, 1, "auto"),
]


def make_prompts(count: int, vocab_size: int, longest: int = 700) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens; some begin alike, so that the cache has work."""
    rng = random.Random(20)
    lengths = [1, longest, *(rng.randint(1, longest) for _ in range(count - 2))]
    stems = [[rng.randrange(vocab_size) for _ in range(longest)] for _ in range(3)]
    prompts = []
    for i, length in enumerate(lengths):
        shared = rng.randint(0, length) if i % 2 else 0
        tail = [rng.randrange(vocab_size) for _ in range(length - shared)]
        prompts.append(stems[i % 3][:shared] + tail)
    return prompts


def load_reference(model_dir: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()  # type: ignore[no-any-return]


def reference_tokens(model: PreTrainedModel, prompts: Sequence[list[int]]) -> list[list[int]]:
    """All prompts in one batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    full = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    return full[:, width:].tolist()  # type: ignore[no-any-return]


@torch.inference_mode()
def margin(model: PreTrainedModel, ids: list[int]) -> float:
    """How far the best next token is before the second."""
    best = model(torch.tensor([ids])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def make_loop(model_dir: Path, way: Way) -> SchedulerLoop:
    config = ServerConfig(
        model=str(model_dir),
        dtype="float32",
        device="cpu",
        page_size=way.page_size,
        num_pages=40_000 // way.page_size,
        max_prefill_tokens=way.budget,
        max_running_requests=32,
        overlap_depth=way.overlap_depth,
        radix_cache=way.radix_cache,
        num_threads=1,
        kernels=way.kernels,
    )
    return build_loop(config, model_dir, LocalChannel(), no_progress)


def run(
    loop: SchedulerLoop, prompts: Sequence[list[int]], at_once: int
) -> tuple[list[list[int]], list[int]]:
    """Output ids and cached tokens of each prompt."""
    channel = loop.channel
    assert isinstance(channel, LocalChannel)
    outputs: list[list[int]] = [[] for _ in prompts]
    cached = [0] * len(prompts)
    waiting = list(enumerate(prompts))
    num_open = 0
    while waiting or num_open:
        while waiting and num_open < at_once:
            uid, prompt = waiting.pop(0)
            ids = np.array(prompt, np.int32)
            channel.inbox.append(GenerateMsg(uid=uid, prompt_ids=ids, sampling=GREEDY))
            num_open += 1
        loop.turn()
        while channel.outbox:
            message = channel.outbox.popleft()
            assert not message.failures, message.failures
            for start in message.starts:
                cached[start.uid] = start.cached_tokens
            for uid, token, finish in zip(
                message.uids.tolist(), message.token_ids.tolist(), message.finishes, strict=True
            ):
                outputs[uid].append(token)
                num_open -= finish != Finish.NONE
    return outputs, cached


def compare(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    expected: Sequence[list[int]],
    outputs: Sequence[list[int]],
) -> list[str]:
    """The ties; raises AssertionError at a difference that is none."""
    ties = []
    for i, (prompt, want, got) in enumerate(zip(prompts, expected, outputs, strict=True)):
        assert len(got) == NEW_TOKENS
        at = next(
            (j for j, pair in enumerate(zip(want, got, strict=True)) if pair[0] != pair[1]), None
        )
        if at is None:
            continue
        gap = margin(model, prompt + want[:at])
        assert gap <= TIE_MARGIN, f"prompt {i} differs at token {at}, where the margin is {gap:.4f}"
        ties.append(f"prompt {i}: a tie at token {at}, margin {gap:.6f}")
    return ties
