"""The neutral request: what every API's fields are read into."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from minisrv.errors import ContextLengthError, InvalidRequestError, Lengths, ModelNotFoundError
from minisrv.frontend.fields.schema import describe
from minisrv.frontend.fields.tools import ToolUse
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.frontend.tool_calls.formats import CallReading
from minisrv.sampling_params import Grammar, SamplingParams, read_logit_bias
from minisrv.wire.arrays import Int32Array
from minisrv.wire.messages import TokenizeMsg

Prompt = str | Int32Array
Messages = tuple[dict[str, Any], ...]

_MAX_TOKEN_ID = 2**31 - 1
# Those with a check or a reading of their own are passed to `read_sampling` by name.
_SAMPLING_NAMES = {field.name for field in fields(SamplingParams)} - {
    *("max_tokens", "grammar", "logit_bias", "echo", "logprobs", "prompt_logprobs"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyOptions:
    """What the reply has besides the text.

    stream: it is sent in pieces. progress: of the prefill. token_ids: of prompt and output.
    prompt_text: the prompt as the model sees it. timings: how long each phase took.
    """

    stream: bool = False
    progress: bool = False
    token_ids: bool = False
    prompt_text: bool = False
    timings: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest(ABC):
    """What both kinds of request have.

    model: the served name that the client used. warnings: sentences for the client about fields
    that have no effect. caps_at: the context, if a max_tokens beyond it means the rest of it; None
    if such a request is refused.
    """

    model: str
    sampling: SamplingParams
    caps_at: int | None = None
    reply: ReplyOptions = ReplyOptions()
    cache_salt: str = ""
    warnings: tuple[str, ...] = ()

    @property
    @abstractmethod
    def num_prompts(self) -> int:
        """Prompts, each with `sampling.n` choices."""

    @property
    def num_choices(self) -> int:
        """Choices of the reply: the uids of the request."""
        return self.num_prompts * self.sampling.n

    @property
    def calls(self) -> CallReading | None:
        """How tool calls are found in the reply; None to look for none."""
        return None

    def output_cap(self, prompt_tokens: int) -> int | None:
        """Where the output behind such a prompt is capped; None if max_tokens fits."""
        asked = self.sampling.max_tokens
        if self.caps_at is None or asked is None or prompt_tokens + asked <= self.caps_at:
            return None
        return self.caps_at - prompt_tokens

    @abstractmethod
    def _prompts(self) -> Iterator[dict[str, Any]]:
        """For each prompt, the fields of a TokenizeMsg that say what it is."""

    def tokenize_messages(self, base: int) -> Iterator[TokenizeMsg]:
        """One message per prompt; choice i of the reply answers under uid `base + i`."""
        for i, prompt in enumerate(self._prompts()):
            yield TokenizeMsg(
                uid=base + i * self.sampling.n,
                sampling=self.sampling,
                caps_output=self.caps_at is not None,
                cache_salt=self.cache_salt,
                show_progress=self.reply.progress,
                show_prompt_ids=self.reply.token_ids,
                show_prompt_text=self.reply.prompt_text,
                **prompt,
            )

    def check_fits(self, max_open_requests: int) -> None:
        """Raise InvalidRequestError if even an idle server cannot run all choices at once."""
        check_num_choices(self.num_prompts, self.sampling.n, max_open_requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest(GenerationRequest):
    """Prompts to continue, each a text or token ids."""

    prompts: tuple[Prompt, ...]

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    def _prompts(self) -> Iterator[dict[str, Any]]:
        return ({"prompt": prompt} for prompt in self.prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation, and how the chat template renders it.

    messages: as templates expect them. template: Jinja source to use instead of the model's.
    begins_turn: the prompt ends with the start of an assistant turn. continues_last: it ends with
    the content of the last message.
    """

    messages: Messages
    tools: ToolUse | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    begins_turn: bool = True
    continues_last: bool = False

    def fields(self) -> dict[str, Any]:
        """The fields of a TokenizeMsg or EncodeMsg."""
        return {
            "messages": self.messages,
            "tools": self.tools.shown if self.tools else None,
            "template_kwargs": self.template_kwargs,
            "chat_template": self.template,
            "add_generation_prompt": self.begins_turn,
            "continue_final_message": self.continues_last,
            "text_arguments": True,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(GenerationRequest):
    """A conversation to answer."""

    prompt: ChatPrompt

    @property
    def num_prompts(self) -> int:
        return 1

    def __post_init__(self) -> None:
        tools, grammar = self.prompt.tools, self.sampling.grammar
        if tools is not None and tools.must_call and grammar is not None:
            raise InvalidRequestError(
                f"tool_choice requires a call, which cannot be combined with {grammar.param}; "
                "send one of them",
                param="tool_choice",
            )

    @property
    def calls(self) -> CallReading | None:
        return self.prompt.tools.reading if self.prompt.tools else None

    def _prompts(self) -> Iterator[dict[str, Any]]:
        tools = self.prompt.tools
        fields = {
            "must_call": tools.must_call if tools else (),
            "parallel_calls": tools is None or tools.reading.parallel,
            "split_reasoning": True,
        }
        yield fields | self.prompt.fields()


def check_num_choices(num_prompts: int, n: int, max_open_requests: int) -> None:
    """Raise InvalidRequestError if even an idle server cannot run all choices at once."""
    num_choices = num_prompts * n
    if num_choices > max_open_requests:
        prompts = f"{num_prompts} prompt{'s' if num_prompts > 1 else ''}"
        raise InvalidRequestError(
            f"the request asks for {num_choices} choices ({prompts}, n={n}); the server takes at "
            f"most {max_open_requests}",
            param="prompt" if num_prompts > 1 else "n",
        )


def served_name(name: str | None, model: ModelInfo) -> str:
    """The model's name in the reply: the one in the request. Raises ModelNotFoundError."""
    if not name:
        return model.name
    if name not in model.names:
        raise model_not_found(name, model)
    return name


def model_not_found(name: str, model: ModelInfo) -> ModelNotFoundError:
    """The error that lists the served names."""
    shown = name if len(name) <= 200 else name[:200] + "..."
    served = ", ".join(map(repr, model.names))
    return ModelNotFoundError(
        f"the model {shown!r} does not exist here; served: {served}", param="model"
    )


def read_sampling(
    values: Mapping[str, Any], model: ModelInfo, *, grammar: Grammar | None = None, **own: Any
) -> SamplingParams:
    """The sampling parameters of a request, completed with the model's defaults.

    values: fields of a request, of which those in SamplingParams are read. own: parameters that the
    API names or reads in its own way. Raises InvalidRequestError.
    """
    given = {name: values[name] for name in _SAMPLING_NAMES if name in values} | own
    biases = read_logit_bias(values.get("logit_bias", {}))
    _check_ids("stop_token_ids", given.get("stop_token_ids", ()), model)
    _check_ids("logit_bias", [bias.token_id for bias in biases], model)
    sampling = SamplingParams(grammar=grammar, logit_bias=biases, **given)
    return sampling.with_defaults(model.defaults)


def read_common(
    fields: Mapping[str, Any], model: ModelInfo, *, shows_cap: bool = False, **reply: bool
) -> dict[str, Any]:
    """What every API reads in the same way: fields of a GenerationRequest.

    shows_cap: a reply of the API says when the context was full before max_tokens.
    reply: further ReplyOptions. Raises ModelNotFoundError.
    """
    policy = model.max_tokens_policy
    caps = policy == "cap" or (policy == "auto" and shows_cap)
    return {
        "model": served_name(fields.get("model"), model),
        "caps_at": model.max_model_len if caps else None,
        "cache_salt": fields.get("cache_salt", ""),
        "reply": ReplyOptions(stream=fields.get("stream", False), **reply),
    }


def read_prompt_ids(
    ids: list[int], model: ModelInfo, path: str, max_tokens: int | None
) -> Int32Array:
    """As read_token_ids, for a prompt. Raises ContextLengthError before it reads too many."""
    if len(ids) > model.max_model_len:
        lengths = Lengths(len(ids), 1 if max_tokens is None else max_tokens, model.max_model_len)
        raise ContextLengthError(lengths, "prompt", param=path)
    return read_token_ids(ids, model, path)


def read_token_ids(ids: list[int], model: ModelInfo, path: str) -> Int32Array:
    """Token ids: at least one, all in the vocabulary. Raises InvalidRequestError."""
    if not ids:
        raise InvalidRequestError(f"{path} is empty; it must hold at least one token", param=path)
    _check_ids(path, ids, model)
    return np.array(ids, np.int32)


def _check_ids(path: str, ids: Sequence[int], model: ModelInfo) -> None:
    size = min(model.vocab_size, _MAX_TOKEN_ID)
    if ids and (min(ids) < 0 or max(ids) >= size):
        wrong = next(id for id in ids if not 0 <= id < size)
        raise InvalidRequestError(
            f"{path} holds {describe(wrong)}; token ids go from 0 to {model.vocab_size - 1}",
            param=path,
        )
