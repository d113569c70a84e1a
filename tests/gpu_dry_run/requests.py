"""Requests that reach every path of a step."""

from __future__ import annotations

from typing import Any

import numpy as np

from minisrv.sampling_params import TokenBias
from minisrv.wire.messages import GenerateMsg
from tests.support.builders import generate_msg

# Server options with which some decode steps are in a graph and others are too large for one.
SMALL = {"cuda_graph_max_bs": 8, "max_running_requests": 64}


def prompts(lens: list[int], first_uid: int = 0, **sampling: Any) -> list[GenerateMsg]:
    """Prompts without a common prefix."""
    return [
        generate_msg(
            first_uid + 100 * i,
            np.full(length, first_uid + i + 1).tolist(),
            **{"max_tokens": 4, "ignore_eos": True, **sampling},
        )
        for i, length in enumerate(lens)
    ]


def of_every_kind() -> list[GenerateMsg]:
    """Requests that together reach every path of a step except grammars."""
    messages = prompts([1, 2, 17, 65, 513, 3000], 0, max_tokens=6)
    messages += prompts([5, 40], 1000, temperature=0.7, top_p=0.9, top_k=20, min_p=0.1, seed=1)
    messages += prompts([30], 2000, n=3, temperature=1.0)
    messages += prompts([9], 3000, logit_bias=(TokenBias(7, 2.0), TokenBias(9, -100.0)))
    messages += prompts([300], 5000, logprobs=5, prompt_logprobs=3)
    messages += prompts([12], 6000, min_tokens=3, stop_token_ids=(5, 6))
    # More suppressed tokens than fit into the words of a step.
    many = tuple(range(100, 356))
    messages += prompts([8] * 5, 7000, min_tokens=3, stop_token_ids=many)
    return messages
