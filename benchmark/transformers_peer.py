"""The peer: transformers' `generate` with sdpa, on a static batch padded on the left."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from serving import Timing
from workloads import Workload


class TransformersPeer:
    """Holds the model; `measure` runs a workload as one batch up to its longest output."""

    def __init__(self, model_dir: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def measure(self, workload: Workload) -> Timing:
        """Wall time of the batch; every sequence gets at least as many tokens as it asked for."""
        longest = max(len(prompt) for prompt, _ in workload)
        count = max(count for _, count in workload)
        ids = torch.zeros(len(workload), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(workload):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        began = time.perf_counter()
        with torch.inference_mode():
            made = self._model.generate(
                ids, attention_mask=mask, max_new_tokens=count, do_sample=False
            )
        wall = time.perf_counter() - began
        assert made.shape[1] == longest + count
        return Timing(wall)
