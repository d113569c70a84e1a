"""The facts about the served model that the frontend uses."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from minisrv.checkpoint.chat_format import ChatFormat
from minisrv.config import ServerConfig
from minisrv.option_values import read_chat_template_kwargs
from minisrv.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """name, aliases: what clients write in `model`. created: Unix seconds of the start.

    max_model_len: tokens of prompt and output together. defaults: the model's own sampling.
    template_kwargs: variables for the chat template of every request.
    max_tokens_policy: as the option.
    chat_format: how the model writes reasoning and tool calls.
    facts: what the processes reported at their start.
    """

    name: str
    created: int
    max_model_len: int
    vocab_size: int
    defaults: SamplingParams
    aliases: tuple[str, ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_tokens_policy: Literal["auto", "cap", "refuse"] = "auto"
    chat_format: ChatFormat = field(default_factory=ChatFormat)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_facts(cls, config: ServerConfig, facts: Mapping[str, Any]) -> ModelInfo:
        return cls(
            name=config.served_name,
            aliases=config.served_names[1:],
            template_kwargs=read_chat_template_kwargs(config.chat_template_kwargs),
            max_tokens_policy=config.max_tokens_policy,
            created=int(time.time()),
            max_model_len=facts["max_seq_len"],
            vocab_size=facts["vocab_size"],
            defaults=SamplingParams(**facts["sampling_defaults"]),
            chat_format=ChatFormat.from_dict(facts["chat_format"]),
            facts=facts,
        )

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    def name_for(self, fields: Mapping[str, Any]) -> str:
        """The name to write in the reply: the one that the request used."""
        return fields.get("model") or self.name
