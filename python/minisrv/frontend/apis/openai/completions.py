"""POST /v1/completions: from fields to a Generation."""

from __future__ import annotations

from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.generation.logprobs import read_text_logprobs
from minisrv.frontend.generation.request import (
    Generation,
    Prompt,
    check_model,
    read_cache_salt,
    read_sampling,
    read_stream,
    read_token_ids,
)
from minisrv.frontend.generation.returned_tokens import read_returned
from minisrv.frontend.registry.model_info import ModelInfo

DEFAULT_MAX_TOKENS = 16


def read_completion(fields: dict[str, Any], model: ModelInfo) -> Generation:
    """Check the fields of a completion. Raises InvalidRequestError."""
    check_model(fields, model)
    echo, logprobs = fields.get("echo", False), read_text_logprobs(fields)
    sampling = read_sampling(
        fields,
        model,
        DEFAULT_MAX_TOKENS,
        echo=echo,
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo else None,
    )
    if fields.get("best_of", 1) not in (1, sampling.n):
        raise InvalidRequestError(
            f"best_of is {fields['best_of']}; this server returns every choice that it "
            "generates, so it must be 1 or n",
            param="best_of",
            code="unsupported_parameter",
        )
    if "prompt" not in fields:
        raise InvalidRequestError("prompt is missing", param="prompt")
    return Generation(
        prompts=_read_prompts(fields["prompt"], model),
        sampling=sampling,
        stream=read_stream(fields),
        returned=read_returned(fields),
        cache_salt=read_cache_salt(fields),
    )


def _read_prompts(prompt: Any, model: ModelInfo) -> tuple[Prompt, ...]:
    """The four forms; their types have been checked."""
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        raise InvalidRequestError("prompt is empty; it must hold a prompt", param="prompt")
    if isinstance(prompt[0], int):
        return (read_token_ids(prompt, model, "prompt"),)
    return tuple(
        item if isinstance(item, str) else read_token_ids(item, model, f"prompt.{i}")
        for i, item in enumerate(prompt)
    )
