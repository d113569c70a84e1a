"""Penalties and biases against transformers' processors and OpenAI's formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from minisrv.engine.forward_batch import Penalties
from minisrv.engine.kernels.torch_native import TorchKernels
from minisrv.engine.sampling.adjust import LogitAdjuster

VOCAB = 50
PROMPT, OUTPUT = [3, 4, 4, 9], [9, 11, 11, 12]


def make_penalties(
    prompt: list[int] | None = None, output: list[int] | None = None, **columns: Any
) -> Penalties:
    """Sample 1 of a step, in row 5; it begins there when `prompt` is given."""
    begins = prompt is not None
    ids = [*(prompt or []), *(output or [])]
    bias = columns.get("bias", {})
    return Penalties(
        samples=np.array([1], np.int32),
        rows=np.array([5], np.int32),
        presence=np.array([columns.get("presence", 0)], np.float32),
        frequency=np.array([columns.get("frequency", 0)], np.float32),
        repetition=np.array([columns.get("repetition", 1)], np.float32),
        begin_rows=np.array([5] if begins else [], np.int32),
        begin_lens=np.array([len(ids)] if begins else [], np.int32),
        begin_prompt_lens=np.array([len(prompt or [])] if begins else [], np.int32),
        begin_ids=np.array(ids, np.int32),
        bias_samples=np.array([1] * len(bias), np.int32),
        bias_ids=np.array(list(bias), np.int32),
        bias_values=np.array(list(bias.values()), np.float32),
    )


def make_adjuster() -> LogitAdjuster:
    return LogitAdjuster(TorchKernels(), 6, VOCAB, torch.device("cpu"))


def random_logits() -> torch.Tensor:
    return torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)) * 3


def adjusted(adjuster: LogitAdjuster, penalties: Penalties) -> torch.Tensor:
    """Row 1 of the logits; the others must be as they were."""
    logits = random_logits()
    adjuster.adjust_(logits, penalties)
    assert torch.equal(logits[[0, 2]], random_logits()[[0, 2]])
    return logits[1]


def test_the_repetition_penalty_is_that_of_transformers_over_prompt_and_output() -> None:
    for penalty in (0.6, 1.3, 2.0):
        ours = adjusted(make_adjuster(), make_penalties(PROMPT, OUTPUT, repetition=penalty))
        ids = torch.tensor([PROMPT + OUTPUT])
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, random_logits()[1:2])[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_bias_is_that_of_transformers() -> None:
    ours = adjusted(make_adjuster(), make_penalties([], bias={7: 5.5, 9: -100.0}))
    ids = torch.tensor([PROMPT])
    processor = SequenceBiasLogitsProcessor([[[7], 5.5], [[9], -100.0]])
    theirs = processor(ids, random_logits()[1:2])[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_presence_and_frequency_follow_the_published_formula_over_only_the_output() -> None:
    ours = adjusted(make_adjuster(), make_penalties(PROMPT, OUTPUT, presence=0.7, frequency=-0.4))
    expected = random_logits()[1].double()
    for token in range(VOCAB):  # mu[j] -> mu[j] - c[j] * frequency - float(c[j] > 0) * presence
        count = OUTPUT.count(token)
        expected[token] -= count * -0.4 + float(count > 0) * 0.7
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-4)


def test_all_together_apply_in_the_stated_order() -> None:
    case = {"repetition": 1.5, "presence": 0.5, "frequency": 0.25, "bias": {9: 2.0}}
    ours = adjusted(make_adjuster(), make_penalties(PROMPT, OUTPUT, **case))
    ids = torch.tensor([PROMPT + OUTPUT])
    expected = RepetitionPenaltyLogitsProcessor(1.5)(ids, random_logits()[1:2])[0]
    for token in set(OUTPUT):
        expected[token] -= 0.5 + 0.25 * OUTPUT.count(token)
    expected[9] += 2.0
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_drawn_tokens_count_as_tokens_that_were_brought() -> None:
    case = {"repetition": 1.5, "presence": 0.5, "frequency": 0.25}
    stepwise = make_adjuster()
    stepwise.adjust_(random_logits(), make_penalties(PROMPT, [], **case))
    for token in OUTPUT:
        stepwise.count_tokens(torch.tensor([0, token, 1]), make_penalties(**case))
    brought = adjusted(make_adjuster(), make_penalties(PROMPT, OUTPUT, **case))
    assert torch.equal(adjusted(stepwise, make_penalties(**case)), brought)


def test_a_row_that_begins_again_forgets_its_last_request() -> None:
    adjuster = make_adjuster()
    adjuster.adjust_(random_logits(), make_penalties(PROMPT, OUTPUT, presence=1.0))
    ours = adjusted(adjuster, make_penalties([1], [], presence=1.0))
    assert torch.equal(ours, random_logits()[1])
