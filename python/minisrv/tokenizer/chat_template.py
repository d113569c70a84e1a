"""Chat templates: messages to prompt text, by Jinja in its immutable sandbox.

The text equals that of transformers' `apply_chat_template`: the same whitespace settings,
filters and globals, loop controls and the `generation` block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minisrv.errors import ConfigError, InvalidRequestError
from minisrv.tokenizer.described_tools import describe_tools, write_calls_as_text

MAX_PROMPT_CHARS = 2**25
MAX_REQUEST_TEMPLATE_CHARS = 2**17
_KEPT_REQUEST_TEMPLATES = 8
_MAX_ERROR_CHARS = 500
# Characters for private use, which no template looks for.
_MARK = "\uf8ff\ue000\uf8ff "
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class _Template:
    compiled: jinja2.Template
    source: str

    @property
    def tests_null_content(self) -> bool:
        """Whether the template knows messages that only call tools by their null content."""
        return re.search(r"\bcontent['\"]?\]? is (not )?none\b", self.source) is not None

    def knows(self, word: str) -> bool:
        return re.search(rf"\b{word}\b", self.source) is not None


class ChatTemplate:
    """The templates of one model, compiled once, and those that requests bring."""

    def __init__(
        self,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, str],
        *,
        describes_tools: bool = False,
    ) -> None:
        """sources: by name, may be empty. special_tokens: variables for the templates.

        describes_tools: a template that takes no tools gets a system turn that describes them.
        Raises ConfigError for a template that does not compile.
        """
        self.describes_tools = describes_tools
        environment = _environment()
        self._templates = {
            name: _compile(environment, name, text) for name, text in sources.items()
        }
        self._of_request = lru_cache(_KEPT_REQUEST_TEMPLATES)(
            lambda text: _compile_request(environment, text)
        )
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Messages,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        at: float | None = None,
    ) -> str:
        """The prompt text. template_kwargs: further variables for the template.

        continue_final_message: end the text where the content of the last message ends.
        chat_template: the source of a template to use instead of the model's.
        at: the Unix time that the template sees; by default the current time.
        A null field of a message counts as absent, unless it is the content of a message with calls
        and the template compares it to null. The role `developer` becomes `system` for a template
        that does not know it. Raises InvalidRequestError if there is no template, and
        with the template's own message if it refuses the messages or fails on them.
        """
        template = self._select(tools) if chat_template is None else self._of_request(chat_template)
        prepared = [_prepare(message, template) for message in messages]
        if self.describes_tools and not template.knows("tools"):
            prepared = prepared if template.knows("tool_calls") else write_calls_as_text(prepared)
            prepared = describe_tools(prepared, tools, template.source) if tools else prepared
        if continue_final_message:
            prepared[-1] = _marked(prepared[-1])
        clock = datetime.now() if at is None else datetime.fromtimestamp(at)
        variables = {
            "strftime_now": clock.strftime,
            **self._special_tokens,
            **(template_kwargs or {}),
            "messages": prepared,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = _generate(template, variables)
            return _cut_at_mark(text) if continue_final_message else text
        except InvalidRequestError:
            raise
        except Exception as error:  # a template can raise anything that Python can
            text = str(error) or type(error).__name__
            raise InvalidRequestError(
                f"the chat template cannot render these messages: {text[:_MAX_ERROR_CHARS]}",
                param="messages" if chat_template is None else "chat_template",
            ) from error

    def _select(self, tools: Sequence[Mapping[str, Any]] | None) -> _Template:
        if tools is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        state = "has no chat template"
        if self._templates:
            state = f"has chat templates ({', '.join(sorted(self._templates))}) but no default one"
        raise InvalidRequestError(
            f"the model {state}; use /v1/completions, or start the server with --chat-template",
            param="messages",
        )


def _generate(template: _Template, variables: dict[str, Any]) -> str:
    """The text. For a template that fails on messages with calls, they are changed: JSON text
    stands for arguments that are objects, or an empty text for contents that are missing, or both.
    """
    try:
        return _join(template.compiled.generate(variables))
    except (TypeError, jinja2.UndefinedError):
        messages = variables["messages"]
        has_calls = any(message.get("tool_calls") for message in messages)
        if not has_calls or not template.knows("tool_calls"):
            raise
        with_contents = [{**one, "content": one.get("content") or ""} for one in messages]
        for changed in (
            [_with_text_arguments(message) for message in messages],
            with_contents,
            [_with_text_arguments(message) for message in with_contents],
        ):
            with suppress(TypeError, jinja2.UndefinedError):
                return _join(template.compiled.generate({**variables, "messages": changed}))
        raise


def _prepare(message: Mapping[str, Any], template: _Template) -> dict[str, Any]:
    """Without null fields, and with reasoning under each name that templates use for it."""
    prepared = {key: value for key, value in message.items() if value is not None}
    if prepared.get("role") == "developer" and "developer" not in template.source:
        prepared["role"] = "system"
    reasoning = next((prepared[key] for key in _REASONING_FIELDS if key in prepared), None)
    if prepared.get("tool_calls") and not prepared.get("content") and template.tests_null_content:
        prepared["content"] = None
    if reasoning is not None:
        prepared = {"thinking": reasoning, **prepared, "reasoning_content": reasoning}
    return prepared


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """The message with a mark where it is to be continued."""
    if not isinstance(message.get("content"), str):
        raise InvalidRequestError(
            "continue_final_message needs a last message with content", param="messages"
        )
    return {**message, "content": message["content"] + _MARK}


def _cut_at_mark(text: str) -> str:
    """The text before the mark. A template that strips the mark's space strips contents."""
    at = text.rfind(_MARK.rstrip())
    if at < 0:
        raise InvalidRequestError(
            "the chat template does not show the last message, so it cannot be continued",
            param="continue_final_message",
        )
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = []
    for call in message.get("tool_calls") or ():
        function = dict(call["function"])
        if not isinstance(function["arguments"], str):
            function["arguments"] = _to_json(function["arguments"])
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls} if calls else message


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` is replaced by its body."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _compile(environment: ImmutableSandboxedEnvironment, name: str, source: str) -> _Template:
    try:
        return _Template(environment.from_string(source), source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the {name} chat template is wrong on line {error.lineno}: {error.message}"
        ) from error


def _compile_request(environment: ImmutableSandboxedEnvironment, source: str) -> _Template:
    if len(source) > MAX_REQUEST_TEMPLATE_CHARS:
        raise InvalidRequestError(
            f"chat_template has {len(source)} characters; the limit is "
            f"{MAX_REQUEST_TEMPLATE_CHARS}",
            param="chat_template",
        )
    try:
        return _compile(environment, "request's", source)
    except ConfigError as error:
        raise InvalidRequestError(error.message, param="chat_template") from error
    except RecursionError:
        raise InvalidRequestError(
            "chat_template is nested too deeply", param="chat_template"
        ) from None


def _join(pieces: Any) -> str:
    kept: list[str] = []
    room = MAX_PROMPT_CHARS
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            raise InvalidRequestError(
                f"the chat template writes more than {MAX_PROMPT_CHARS} characters",
                param="messages",
            )
        kept.append(piece)
    return "".join(kept)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_to_list,
    )


def _to_list(value: Any) -> list[Any]:
    """What a filter such as `map` returns."""
    if isinstance(value, Iterator):
        return list(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
