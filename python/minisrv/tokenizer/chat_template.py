"""Chat templates: messages to prompt text, by Jinja in its immutable sandbox.

The text equals that of transformers' `apply_chat_template`: the same whitespace settings,
filters and globals, loop controls and the `generation` block.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minisrv.errors import ConfigError, InvalidRequestError

MAX_PROMPT_CHARS = 2**25
_MAX_ERROR_CHARS = 500
# Characters for private use, which no template looks for.
_MARK = "\uf8ff\ue000\uf8ff "
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """The templates of one model, compiled once."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """`sources` by name, maybe none at all; templates see `special_tokens` as variables.

        Raises ConfigError for a template that does not compile.
        """
        environment = _environment()
        self._templates = {
            name: _compile(environment, name, text) for name, text in sources.items()
        }
        self._knows_developer = {name for name, text in sources.items() if "developer" in text}
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Messages,
        template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt text. `template_kwargs` are more variables for the template.

        continue_final_message: end it where the content of the last message ends.

        A null field of a message counts as absent. The role `developer` becomes `system` for a
        template that does not know it. Raises InvalidRequestError when there is no template, and
        with the template's own words when it refuses the messages or fails on them.
        """
        name = self._select(tools)
        prepared = [self._prepare(message, name) for message in messages]
        if continue_final_message:
            prepared[-1] = _marked(prepared[-1])
        variables = {
            **self._special_tokens,
            **(template_kwargs or {}),
            "messages": prepared,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._generate(name, variables)
            return _cut_at_mark(text) if continue_final_message else text
        except InvalidRequestError:
            raise
        except Exception as error:  # a template can raise anything that Python can
            text = str(error) or type(error).__name__
            raise InvalidRequestError(
                f"the chat template cannot render these messages: {text[:_MAX_ERROR_CHARS]}",
                param="messages",
            ) from error

    def _generate(self, name: str, variables: dict[str, Any]) -> str:
        """The text. A template that fails on arguments as objects gets them as JSON text."""
        template = self._templates[name]
        try:
            return _join(template.generate(variables))
        except TypeError:
            if not any(message.get("tool_calls") for message in variables["messages"]):
                raise
            messages = [_with_text_arguments(message) for message in variables["messages"]]
            return _join(template.generate({**variables, "messages": messages}))

    def _select(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        if tools is not None and "tool_use" in self._templates:
            return "tool_use"
        if "default" in self._templates:
            return "default"
        state = "has no chat template"
        if self._templates:
            state = f"has chat templates ({', '.join(sorted(self._templates))}) but no default one"
        raise InvalidRequestError(
            f"the model {state}; use /v1/completions, or start the server with --chat-template",
            param="messages",
        )

    def _prepare(self, message: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Absent fields absent, the reasoning under each name that templates read it by."""
        prepared = {key: value for key, value in message.items() if value is not None}
        if prepared.get("role") == "developer" and name not in self._knows_developer:
            prepared["role"] = "system"
        reasoning = next((prepared[key] for key in _REASONING_FIELDS if key in prepared), None)
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
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_as_text(call) for call in message["tool_calls"]]}


def _as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else _to_json(arguments)
    return {**call, "function": {**function, "arguments": text}}


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text: here just its body."""

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
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _compile(environment: ImmutableSandboxedEnvironment, name: str, source: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the {name} chat template is wrong on line {error.lineno}: {error.message}"
        ) from error


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
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
