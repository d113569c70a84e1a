"""The sampling parameters of a request, and what ends its text."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from ctypes import c_float
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

from minisrv.errors import InvalidRequestError

_T = TypeVar("_T")

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_BIASES = 1024
MAX_GRAMMAR_BYTES = 2**17
MAX_LOGPROBS = 20
_MAX_INT = 2**31 - 1
# The range of each number; "(" excludes the lower end, also for what becomes it as the 32-bit float
# that the engine computes with. A repetition penalty divides the logits, which must stay finite.
# max_tokens is checked with other fields.
_NUMBERS = {
    "temperature": ("[", 0, 2),
    "top_p": ("(", 0, 1),
    "min_p": ("[", 0, 1),
    "presence_penalty": ("[", -2, 2),
    "frequency_penalty": ("[", -2, 2),
    "repetition_penalty": ("[", 1e-6, 2),
}
_INTEGERS = {
    "top_k": (-1, _MAX_INT),
    "seed": (-(2**63), 2**63 - 1),
    "n": (1, MAX_CHOICES),
    "min_tokens": (0, _MAX_INT),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """A grammar that the whole output must match.

    kind: json_schema (text: the schema as JSON), regex, choice (text: a JSON array of strings) or
    lark (text: llguidance's Lark, in which `%json {...}` embeds a schema, or GBNF).
    param: the request field it came from, for messages. before: Lark rules for output that comes
    before the constrained text, which they call `@text`; empty if there is none. parts: grammars
    from which this one was written; if it is refused, the first of these that is wrong is named.
    Raises InvalidRequestError for a text over the size limit or with a lone surrogate; the grammar
    is checked later.
    """

    kind: str
    text: str
    param: str = "grammar"
    before: str = ""
    parts: tuple[Grammar, ...] = ()

    def __post_init__(self) -> None:
        try:
            num_bytes = len(self.text.encode())
        except UnicodeEncodeError as error:
            _refuse(self.param, f"has a lone surrogate at character {error.start}")
        _check_count(self.param, num_bytes, "bytes", MAX_GRAMMAR_BYTES)

    @classmethod
    def json_schema(cls, schema: str | bool | Mapping[str, Any], param: str = "grammar") -> Grammar:
        """JSON that is valid under `schema`, given as an object or as its JSON text."""
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        return cls(kind="json_schema", text=text, param=param)

    @classmethod
    def json_object(cls, param: str = "grammar") -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"}, param)

    @classmethod
    def regex(cls, pattern: str, param: str = "grammar") -> Grammar:
        """Text that `pattern` matches as a whole."""
        return cls(kind="regex", text=pattern, param=param)

    @classmethod
    def choice(cls, choices: Sequence[str], param: str = "grammar") -> Grammar:
        """One of `choices`."""
        return cls(kind="choice", text=json.dumps(list(choices), ensure_ascii=False), param=param)

    @classmethod
    def lark(cls, grammar: str, param: str = "grammar") -> Grammar:
        """Text that a context-free grammar derives."""
        return cls(kind="lark", text=grammar, param=param)


@dataclass(frozen=True, slots=True)
class TokenBias:
    """A value added to the logit of one token."""

    token_id: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """One request's sampling. `None` means the model's default; see `with_defaults`.

    temperature: 0 to 2; 0 is greedy.
    top_k: 0 or -1 keeps all tokens. top_p: in (0, 1]. min_p: in [0, 1], relative to the likeliest
    token. seed: the draws then depend only on (seed, choice index, position).
    n: number of choices. max_tokens: output tokens; `None` allows the rest of the context; 0
    computes only the prompt, for `echo` or `prompt_logprobs`.
    min_tokens: output tokens before which neither end-of-text nor a stop token is sampled.
    presence_penalty, frequency_penalty: -2 to 2, over the output. repetition_penalty: 1e-6 to 2,
    over prompt and output; 1 is off. logit_bias: added to the logits, clamped to -100..100.
    stop: the text ends before the first of these strings. stop_token_ids: it ends at these tokens.
    include_stop_str_in_output: keep the stop string that ended the text.
    grammar: what the text must match; the text ends where the grammar does.
    return_token_ids: over HTTP, return the output's token ids with the text.
    echo: over HTTP, return the prompt's text before the output's.
    logprobs, prompt_logprobs: 0 to 20; return the log-probability of each output or prompt token,
    and those of this many likeliest alternatives. They are the model's own: before temperature,
    penalties, biases and grammar.

    Raises InvalidRequestError for a value out of range.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    grammar: Grammar | None = None
    return_token_ids: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: tuple[TokenBias, ...] = ()
    include_stop_str_in_output: bool = False
    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            object.__setattr__(self, name, tuple(value or ()))  # nobody has seen this object yet
        for name, (bracket, low, high) in _NUMBERS.items():
            value = getattr(self, name)
            inside = value is None or (_is_number(value) and low <= value <= high)
            if not inside or (bracket == "(" and value is not None and c_float(value).value == low):
                _refuse(name, f"is {_shown(value)}; it must be in {bracket}{low}, {high}]")
        for name, (least, most) in _INTEGERS.items():
            _check_integer(name, getattr(self, name), least, most)
        without_output = self.echo or self.prompt_logprobs is not None
        _check_integer("max_tokens", self.max_tokens, 0 if without_output else 1, _MAX_INT)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", f"is {self.min_tokens}, more than the limit, {self.max_tokens}")
        object.__setattr__(self, "logit_bias", _checked_biases(self.logit_bias))
        self._check_stops()

    @property
    def penalizes_tokens(self) -> bool:
        """Whether earlier tokens change the logits."""
        repetition = self.repetition_penalty not in (None, 1)
        return bool(self.presence_penalty or self.frequency_penalty or repetition)

    @property
    def adjusts_logits(self) -> bool:
        """Whether penalties or biases change the logits."""
        return self.penalizes_tokens or bool(self.logit_bias)

    @property
    def num_top_logprobs(self) -> int:
        """The number of likeliest tokens to compute per position."""
        return max(self.logprobs or 0, self.prompt_logprobs or 0)

    def least_output(self, *, capped: bool) -> int:
        """The tokens for which the context must have room behind the prompt.

        capped: a max_tokens beyond the context means the rest of it.
        """
        if self.max_tokens is None:
            return 1
        return min(self.max_tokens, max(1, self.min_tokens)) if capped else self.max_tokens

    def _check_stops(self) -> None:
        _check_count("stop", len(self.stop), "strings", MAX_STOP_STRINGS)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                _refuse("stop", "must contain only non-empty strings")
            if len(text) > MAX_STOP_CHARS:
                raise InvalidRequestError(
                    f"a stop string has {len(text)} characters; the limit is {MAX_STOP_CHARS}",
                    param="stop",
                )
        _check_count("stop_token_ids", len(self.stop_token_ids), "ids", MAX_STOP_TOKEN_IDS)
        for token_id in self.stop_token_ids:
            _check_integer("stop_token_ids", token_id, 0, _MAX_INT)

    def with_defaults(self, defaults: SamplingParams) -> SamplingParams:
        """Replace each None by `defaults`, or where that is None too by OpenAI's default."""
        return replace(
            self,
            temperature=_first(self.temperature, defaults.temperature, 1.0),
            top_p=_first(self.top_p, defaults.top_p, 1.0),
            top_k=max(0, _first(self.top_k, defaults.top_k, 0)),
            min_p=_first(self.min_p, defaults.min_p, 0.0),
            repetition_penalty=_first(self.repetition_penalty, defaults.repetition_penalty, 1.0),
        )


def _first(*values: _T | None) -> _T:
    return next(value for value in values if value is not None)


def _refuse(param: str, problem: str) -> NoReturn:
    raise InvalidRequestError(f"{param} {problem}", param=param)


def _is_number(value: Any) -> bool:
    """Whether `value` is a finite number in the range of a double."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**40:  # Python writes no integer of 5,000 digits
        return f"an integer of {value.bit_length()} bits"
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def _check_count(param: str, count: int, what: str, limit: int) -> None:
    if count > limit:
        _refuse(param, f"has {count} {what}; the limit is {limit}")


def _check_integer(param: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        _refuse(param, f"is {_shown(value)}; it must be an integer")
    if not low <= value <= high:
        _refuse(param, f"is {_shown(value)}; it must be from {low} to {high}")


def _checked_biases(biases: tuple[TokenBias, ...]) -> tuple[TokenBias, ...]:
    _check_count("logit_bias", len(biases), "tokens", MAX_BIASES)
    for bias in biases:
        _check_integer("logit_bias", bias.token_id, 0, _MAX_INT)
        if not _is_number(bias.value):
            shown = "null" if bias.value is None else _shown(bias.value)
            _refuse(f"logit_bias.{bias.token_id}", f"is {shown}; it must be a number")
    return tuple(TokenBias(b.token_id, min(100.0, max(-100.0, b.value))) for b in biases)


def read_logit_bias(biases: Mapping[str, float]) -> tuple[TokenBias, ...]:
    """The biases in a request, keyed by token id as a string. Raises InvalidRequestError."""
    _check_count("logit_bias", len(biases), "tokens", MAX_BIASES)
    for key in biases:
        digits = key.isascii() and key.isdigit() and len(key) <= 10
        if not digits or str(int(key)) != key:  # "05" and "5" would be the same token
            shown = repr(key[:50])
            _refuse("logit_bias", f"has the key {shown}; keys are token ids without leading zeros")
    return tuple(TokenBias(int(key), value) for key, value in biases.items())
