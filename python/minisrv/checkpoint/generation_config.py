"""The sampling defaults in generation_config.json, and what it asks for that is not used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.sampling_params import SamplingParams

# Parameters that generation_config.json may set for requests that omit them.
SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# What would change a text and is not implemented, or is only a request's to set, and the value
# with which it changes nothing. Empty and null values change nothing either.
_NEUTRAL: dict[str, Any] = {
    "typical_p": 1.0,
    "top_h": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "token_healing": False,
    "stop_strings": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "max_length": 20,
    "max_new_tokens": None,
    "max_time": None,
}
_MAX_SHOWN_CHARS = 60


def read_defaults(generation: Mapping[str, Any]) -> tuple[SamplingParams, tuple[str, ...]]:
    """The defaults for requests that omit them, and a phrase for each entry that is not used."""
    values: dict[str, Any] = {}
    unused: list[str] = []
    for name in SAMPLING_DEFAULTS:
        value = generation.get(name)
        if name == "top_k" and isinstance(value, float) and value.is_integer():
            value = int(value)
        try:
            SamplingParams(**dict[str, Any]({name: value}))
        except InvalidRequestError as error:
            unused.append(error.message)
        else:
            values[name] = value
    if generation.get("do_sample") is False:
        values["temperature"] = 0.0
    for key, neutral in _NEUTRAL.items():
        value = generation.get(key)
        if value not in (None, neutral, [], {}):
            unused.append(f"{key}={str(value)[:_MAX_SHOWN_CHARS]}")
    return SamplingParams(**values), tuple(unused)
