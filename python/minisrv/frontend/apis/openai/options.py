"""Fields that chat completions and completions share, and that are not only sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.openai.render import StreamOptions
from minisrv.frontend.fields.grammar import read_grammar
from minisrv.frontend.fields.names import merge_aliases
from minisrv.frontend.generation.request import (
    ReplyOptions,
    read_cache_salt,
    read_sampling,
    served_name,
)
from minisrv.frontend.registry.model_info import ModelInfo


def read_common(fields: Mapping[str, Any], model: ModelInfo, **own: Any) -> dict[str, Any]:
    """The fields of a GenerationRequest. own: sampling parameters that the two read differently.

    Raises InvalidRequestError.
    """
    name = served_name(fields.get("model"), model)
    merged = merge_aliases(fields)
    sampling = read_sampling(merged, model, grammar=read_grammar(fields), **own)
    stream = fields.get("stream", False)
    if not stream:
        for option in ("stream_options", "return_progress"):
            if fields.get(option):
                raise InvalidRequestError(f"{option} needs stream to be true", param=option)
    reply = ReplyOptions(
        stream=stream,
        progress=fields.get("return_progress", False),
        token_ids=merged.get("return_token_ids", False),
        prompt_text=fields.get("return_prompt", False),
        timings=fields.get("timings", False),
    )
    cache_salt = read_cache_salt(fields.get("cache_salt"))
    return {"model": name, "sampling": sampling, "reply": reply, "cache_salt": cache_salt}


def read_stream_options(fields: Mapping[str, Any]) -> StreamOptions:
    """What a stream holds besides its choices."""
    options = fields.get("stream_options", {})
    return StreamOptions(
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("continuous_usage_stats")),
    )
