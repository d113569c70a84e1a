"""A checked request: what goes to the tokenizer and how the reply is to look."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minisrv.errors import InvalidRequestError, ModelNotFoundError
from minisrv.frontend.apis.openai.render import StreamOptions
from minisrv.frontend.fields.aliases import merge_aliases, name_sent
from minisrv.frontend.fields.grammar import read_grammar
from minisrv.frontend.fields.names import rename_fields
from minisrv.frontend.generation.assistant_message import CallReading
from minisrv.frontend.generation.returned_tokens import Returned
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.sampling_params import SamplingParams, read_logit_bias
from minisrv.wire.arrays import token_array
from minisrv.wire.messages import TokenizeMsg

Prompt = str | tuple[int, ...]
Messages = tuple[dict[str, Any], ...]

MAX_SALT_CHARS = 128
_MAX_TOKEN_ID = 2**31 - 1
_MAX_COMPLETION_TOKENS = ((re.compile(r"\bmax_tokens\b"), "max_completion_tokens"),)
_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "n",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "return_token_ids",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "include_stop_str_in_output",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One client request. It has `prompts`, or `messages` as its single prompt.

    tools: what the template shows. calls: how calls are found in the reply, None if they are not.
    must_call: names of the tools one of which must be called.
    returned: what the reply tells of tokens and prompt.
    warnings: what the client is to know of fields that do nothing here.
    stream: None for a whole reply.
    """

    prompts: tuple[Prompt, ...] = ()
    messages: Messages | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    calls: CallReading | None = None
    must_call: tuple[str, ...] = ()
    returned: Returned | None = None
    cache_salt: str = ""
    warnings: tuple[str, ...] = ()
    sampling: SamplingParams
    stream: StreamOptions | None

    @property
    def num_prompts(self) -> int:
        """Prompts, each with `sampling.n` choices."""
        return len(self.prompts) or 1

    @property
    def num_choices(self) -> int:
        """Choices of the reply; the uids of the request."""
        return self.num_prompts * self.sampling.n

    @property
    def echoed(self) -> tuple[str | None, ...]:
        """The prompts as they were sent, None for token ids."""
        return tuple(prompt if isinstance(prompt, str) else None for prompt in self.prompts)

    def check_fits(self, max_open_requests: int) -> None:
        """Raise InvalidRequestError if even an idle server could not take so many choices."""
        if self.num_choices > max_open_requests:
            prompts = f"{self.num_prompts} prompt{'s' if self.num_prompts > 1 else ''}"
            raise InvalidRequestError(
                f"the request asks for {self.num_choices} choices ({prompts}, "
                f"n={self.sampling.n}); the server takes at most {max_open_requests}",
                param="prompt" if self.num_prompts > 1 else "n",
            )

    def tokenize_messages(self, base: int) -> list[TokenizeMsg]:
        """One message a prompt; choice i of the reply answers under uid `base + i`."""
        common: dict[str, Any] = {
            "sampling": self.sampling,
            "cache_salt": self.cache_salt,
            "show_progress": self.stream is not None and self.stream.progress,
            "show_prompt_ids": self.returned is not None and self.returned.token_ids,
            "show_prompt_text": self.returned is not None and self.returned.prompt,
        }
        if self.messages is not None:
            return [
                TokenizeMsg(
                    uid=base,
                    messages=self.messages,
                    template_kwargs=self.template_kwargs,
                    tools=self.tools,
                    must_call=self.must_call,
                    parallel_calls=self.calls is None or self.calls.parallel,
                    split_reasoning=True,
                    add_generation_prompt=self.add_generation_prompt,
                    continue_final_message=self.continue_final_message,
                    chat_template=self.chat_template,
                    **common,
                )
            ]
        return [
            TokenizeMsg(
                uid=base + i * self.sampling.n,
                prompt=prompt if isinstance(prompt, str) else token_array(prompt),
                **common,
            )
            for i, prompt in enumerate(self.prompts)
        ]


def check_model(fields: dict[str, Any], model: ModelInfo) -> None:
    """Raise ModelNotFoundError unless the request means the served model."""
    name = fields.get("model")
    if name and name not in model.names:
        raise model_not_found(name, model)


def model_not_found(name: str, model: ModelInfo) -> ModelNotFoundError:
    """The error that says what is served."""
    shown = name if len(name) <= 200 else name[:200] + "..."
    served = ", ".join(repr(name) for name in model.names)
    return ModelNotFoundError(
        f"the model {shown!r} does not exist here; served: {served}", param="model"
    )


def read_sampling(
    fields: dict[str, Any],
    model: ModelInfo,
    default_max_tokens: int | None,
    **more: int | bool | None,
) -> SamplingParams:
    """The request's sampling over the model's defaults; `more` are parameters that have been read.

    max_completion_tokens goes before max_tokens, its older name.
    Raises InvalidRequestError.
    """
    max_tokens = fields.get("max_completion_tokens", fields.get("max_tokens"))
    merged = merge_aliases(fields)
    given = {name: merged[name] for name in _SAMPLING_FIELDS if name in merged} | more
    biases = given["logit_bias"] = read_logit_bias(fields.get("logit_bias", {}))
    _check_vocabulary("stop_token_ids", fields.get("stop_token_ids", ()), model)
    _check_vocabulary("logit_bias", [bias.token_id for bias in biases], model)
    try:
        sampling = SamplingParams(
            max_tokens=default_max_tokens if max_tokens is None else max_tokens,
            grammar=read_grammar(fields),
            **given,
        )
    except InvalidRequestError as error:
        if "max_completion_tokens" in fields:
            rename_fields(error, _MAX_COMPLETION_TOKENS)
        error.param = name_sent(error.param, fields)
        raise
    return sampling.with_defaults(model.defaults)


def read_cache_salt(fields: dict[str, Any]) -> str:
    """The salt of a request, empty without one. Raises InvalidRequestError."""
    salt: str = fields.get("cache_salt", "")
    if "cache_salt" in fields and not 0 < len(salt) <= MAX_SALT_CHARS:
        raise InvalidRequestError(
            f"cache_salt has {len(salt)} characters; it must have 1 to {MAX_SALT_CHARS}",
            param="cache_salt",
        )
    return salt


def read_stream(fields: dict[str, Any]) -> StreamOptions | None:
    """How to stream, None for a whole reply. Raises InvalidRequestError."""
    options = fields.get("stream_options", {})
    if not fields.get("stream", False):
        for name in ("stream_options", "return_progress"):
            if fields.get(name):
                raise InvalidRequestError(f"{name} needs stream to be true", param=name)
        return None
    return StreamOptions(
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("continuous_usage_stats")),
        progress=fields.get("return_progress", False),
    )


def read_token_ids(ids: list[int], model: ModelInfo, path: str) -> tuple[int, ...]:
    """A prompt of token ids, at least one, all in the vocabulary. Raises InvalidRequestError."""
    if not ids:
        raise InvalidRequestError(f"{path} is empty; it must hold at least one token", param=path)
    if min(ids) < 0 or max(ids) >= min(model.vocab_size, _MAX_TOKEN_ID):
        wrong = next(i for i in ids if not 0 <= i < model.vocab_size)
        raise InvalidRequestError(
            f"{path} holds {wrong}; token ids go from 0 to {model.vocab_size - 1}", param=path
        )
    return tuple(ids)


def _check_vocabulary(name: str, ids: Sequence[int], model: ModelInfo) -> None:
    wrong = next((id for id in ids if not 0 <= id < model.vocab_size), None)
    if wrong is not None:
        raise InvalidRequestError(
            f"{name} holds {wrong}; ids go from 0 to {model.vocab_size - 1}", param=name
        )
