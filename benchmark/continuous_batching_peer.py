"""The peer: transformers' continuous batching, which its `generate_batch` runs.

Attention is paged sdpa. If flash-attn is installed, transformers uses that instead.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from roofline import synchronize

Requests = Sequence[tuple[list[int], int]]


def measure_peer(model_dir: Path, requests: Requests, device: torch.device) -> float:
    """Seconds that transformers takes for the requests, with random weights of the same shapes.

    `generate_batch` has one output length for all requests. Its manager, used here, takes a length
    per request.
    """
    with device:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(model_dir),
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
        ).eval()
    config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(count for _, count in requests),
        eos_token_id=-1,
        pad_token_id=0,
    )
    with model.continuous_batching_context_manager(generation_config=config) as manager:
        _serve(manager, [([1] * 8, 4)])
        synchronize(device)
        began = time.perf_counter()
        _serve(manager, requests)
        synchronize(device)
        return time.perf_counter() - began


def _serve(manager: Any, requests: Requests) -> None:
    """Raises RuntimeError unless each request gets exactly as many tokens as it asks for."""
    wanted = {
        manager.add_request(prompt, max_new_tokens=count): count for prompt, count in requests
    }
    while wanted:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("transformers' continuous batching has stopped")
            continue
        if result.error is not None:
            raise RuntimeError(f"transformers: {result.error}")
        if result.is_finished():
            count = wanted.pop(result.request_id)
            if len(result.generated_tokens) != count:
                raise RuntimeError(
                    f"{len(result.generated_tokens)} tokens were generated, not {count}"
                )
