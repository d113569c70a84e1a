"""Which draws are right: transformers' model and processors, OpenAI's formula, the stated draw.

docs/sampling.md says the order, and that a draw comes from (seed, choice, position) alone. The text
is given; each of its tokens must be the one at which the running sum of the probabilities passes
the draw, up to TOLERANCE.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minisrv.sampling_params import SamplingParams

TOLERANCE = 1e-4
MASK = (1 << 64) - 1
# The tokens that may follow an output, as a bool for each id.
Allowed = Callable[[Sequence[int]], np.ndarray]


def mix(value: int) -> int:
    """SplitMix64: its step, then its finaliser (Steele, Lea, Flood, 2014)."""
    value = value + 0x9E3779B97F4A7C15 & MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def uniform(seed: int, choice: int, position: int) -> float:
    """The draw of the token at `position` of prompt and output."""
    return (mix(mix(mix(seed & MASK) ^ choice) ^ position) >> 12) / 2**52


def adjusted_logits(
    logits: torch.Tensor,
    prompt: Sequence[int],
    output: Sequence[int],
    params: SamplingParams,
    eos_ids: Sequence[int] = (),
    allowed: np.ndarray | None = None,
) -> torch.Tensor:
    """Logits [V] in float64 after all that comes before the temperature."""
    ids = torch.tensor([[*prompt, *output]])
    scores = logits.double()[None]
    if params.repetition_penalty not in (None, 1):
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token, count in Counter(output).items():
        # mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence
        penalty = count * params.frequency_penalty + float(count > 0) * params.presence_penalty
        scores[0, token] -= penalty
    if params.logit_bias:
        biases = [[[bias.token_id], bias.value] for bias in params.logit_bias]
        scores = SequenceBiasLogitsProcessor(biases)(ids, scores)
    if allowed is not None:
        scores = scores.masked_fill(~torch.from_numpy(allowed), -torch.inf)
    ends = [*([] if params.ignore_eos else eos_ids), *params.stop_token_ids]
    if params.min_tokens and ends:
        processor = MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, ends, "cpu")
        without = processor(ids, scores)
        if without.isfinite().any():  # else a grammar leaves nothing but an end
            scores = without
    return scores[0]


def probabilities(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Of each token [V], from adjusted logits, for a temperature above 0."""
    assert params.temperature
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k and params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p is not None and params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    # Below the best, so that no temperature makes infinities of finite scores.
    return warpers(None, scores[None] - scores.max())[0].softmax(-1)


@torch.inference_mode()
def closest_call(
    model: PreTrainedModel,
    prompt: Sequence[int],
    output: Sequence[int],
    params: SamplingParams,
    choice: int = 0,
) -> float:
    """How much an error may change a probability or a logit before any token becomes another.

    That is the least distance of a draw from the borders of its token; for a temperature of 0, of
    the best logit from the second.
    """
    logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
    least = math.inf
    for i, token in enumerate(output):
        scores = adjusted_logits(logits[i], prompt, output[:i], params)
        if not params.temperature:
            best, second = scores.topk(2).values.tolist()
            least = min(least, best - second)
            continue
        assert params.seed is not None
        probs = probabilities(scores, params)
        high, draw = float(probs.cumsum(-1)[token]), uniform(params.seed, choice, len(prompt) + i)
        least = min(least, high - draw, draw - (high - float(probs[token])))
    return least


@torch.inference_mode()
def check_tokens(
    model: PreTrainedModel,
    prompt: Sequence[int],
    output: Sequence[int],
    params: SamplingParams,
    choice: int = 0,
    eos_ids: Sequence[int] = (),
    allowed: Allowed | None = None,
) -> None:
    """Assert that each token of `output` is the one to draw after those before it."""
    logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
    assert len(logits) == len(output) > 0
    for i, token in enumerate(output):
        before = output[:i]
        mask = None if allowed is None else allowed(before)
        scores = adjusted_logits(logits[i], prompt, before, params, eos_ids, mask)
        if not params.temperature:
            behind = float(scores.max() - scores[token])
            assert behind <= TOLERANCE, f"token {i}, {token}, is not the best by {behind}"
            continue
        assert params.seed is not None
        probs = probabilities(scores, params)
        assert probs[token] > 0, f"token {i}, {token}, may not come"
        high = float(probs.cumsum(-1)[token])
        low, draw = high - float(probs[token]), uniform(params.seed, choice, len(prompt) + i)
        close = low - TOLERANCE <= draw <= high + TOLERANCE
        assert close, f"token {i}, {token}, stands for {low} to {high}; the draw was {draw}"
