"""Checkpoints in 16 bits whose next token is clear, and what transformers says in float32.

16 bits move the logits of these models by about 0.03, so a greedy token is right if it is not far
behind the best one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from minisrv.llm import LLM
from minisrv.llm.outputs import CompletionOutput, RequestOutput
from minisrv.sampling_params import SamplingParams
from tests.support.checkpoints import EOS_ID, make_model, make_tokenizer
from tests.support.sampled_oracle import Allowed, adjusted_logits

MARGIN = 0.3
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def save_checkpoint(
    path: Path, arch: str, head_dim: int, dtype: torch.dtype = torch.bfloat16, **variant: Any
) -> Path:
    """With its tokenizer. Attention and logits are flatter than usual: 16 bits move them less."""
    model = make_model(arch, head_dim=head_dim, **variant)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 0.4
        elif "lm_head" in name:
            parameter.data *= 0.67
    model = model.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(path)
    make_tokenizer(model.config.vocab_size).save_pretrained(path)
    return path


def load(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model  # type: ignore[no-any-return]


@torch.inference_mode()
def logits_of(model: PreTrainedModel, ids: Sequence[int], **options: Any) -> torch.Tensor:
    """Of every position, [T, V], in float32 on the host."""
    device = next(model.parameters()).device
    given = torch.tensor([list(ids)], device=device)
    return model(given, **options).logits[0].float().cpu()  # type: ignore[no-any-return]


def generate(
    path: Path,
    device: torch.device,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    **options: Any,
) -> list[RequestOutput]:
    """All requests together, in an engine of 16 bits."""
    options = {"num_pages": 2000, "max_prefill_tokens": 64, "max_running_requests": 32, **options}
    with LLM(path, device=device.type, num_threads=1, **options) as llm:
        return llm.generate_outputs(list(prompts), list(params), use_tqdm=False)


def assert_best(
    logits_TV: torch.Tensor,
    prompt: Sequence[int],
    choice: CompletionOutput,
    params: SamplingParams,
    allowed: Allowed | None = None,
    margin: float = MARGIN,
) -> None:
    """Each token is at most `margin` behind the best after penalties, biases and masks.

    logits_TV: of every position of prompt and output.
    """
    output = choice.token_ids
    assert output
    for i, token in enumerate(output):
        before = output[:i]
        mask: np.ndarray | None = None if allowed is None else allowed(before)
        scores = adjusted_logits(
            logits_TV[len(prompt) - 1 + i], prompt, before, params, [EOS_ID], mask
        )
        behind = float(scores.max() - scores[token])
        assert behind <= margin, f"token {i}, {token}, is behind the best by {behind:.3f}"
