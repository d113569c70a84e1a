"""The random checkpoints say something: else tests of greedy text would prove nothing."""

from __future__ import annotations

import random
import statistics

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.checkpoints import ARCHITECTURES, make_model

NUM_PROMPTS = 24


def greedy(model: PreTrainedModel, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """32 tokens after each prompt, and the margin of the best over the second in each step."""
    made = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=32,
        min_new_tokens=32,
        eos_token_id=-1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(made.logits).topk(2, -1).values
    return made.sequences[:, prompts.shape[1] :], (best[..., 0] - best[..., 1]).flatten()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_text_is_clear_varied_and_moved_by_an_early_token(arch: str) -> None:
    model, rng = make_model(arch), random.Random(1)
    prompts = torch.tensor([[rng.randrange(256) for _ in range(40)] for _ in range(NUM_PROMPTS)])
    changed = prompts.clone()
    changed[:, 2] = (changed[:, 2] + 7) % 256
    texts, margins = greedy(model, prompts)
    other_texts, _ = greedy(model, changed)
    assert margins.median() > 0.05
    assert statistics.median(len(set(text)) for text in texts.tolist()) >= 10
    assert (texts != other_texts).any(-1).sum() >= 0.8 * NUM_PROMPTS
