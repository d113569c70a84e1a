"""POST /v1/chat/completions: from fields to a Generation with messages for the template."""

from __future__ import annotations

from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.fields.reasoning import read_reasoning, reasoning_warnings
from minisrv.frontend.fields.template import check_no_template, read_template, read_template_kwargs
from minisrv.frontend.fields.tools import read_must_call, read_tools
from minisrv.frontend.generation.logprobs import read_chat_logprobs
from minisrv.frontend.generation.request import (
    Generation,
    check_model,
    read_cache_salt,
    read_sampling,
    read_stream,
    read_token_ids,
)
from minisrv.frontend.generation.returned_tokens import read_returned
from minisrv.frontend.http.body import parse_json
from minisrv.frontend.registry.model_info import ModelInfo


def read_chat(fields: dict[str, Any], model: ModelInfo) -> Generation:
    """Check the fields of a chat completion. Raises InvalidRequestError."""
    check_model(fields, model)
    sampling = read_sampling(fields, model, None, logprobs=read_chat_logprobs(fields))
    stream = read_stream(fields)
    returned = read_returned(fields)
    cache_salt = read_cache_salt(fields)
    template_kwargs = dict(model.template_kwargs) | read_reasoning(fields, model.chat_format)
    template_kwargs |= read_template_kwargs(fields.get("chat_template_kwargs", {}))
    tools, calls = read_tools(fields, model.chat_format)
    must_call = read_must_call(fields, calls)
    if must_call and sampling.grammar is not None:
        raise InvalidRequestError(
            f"send {sampling.grammar.param} or a tool_choice that asks for a call, not both",
            param="tool_choice",
        )
    if "prompt" not in fields:
        return Generation(
            messages=_read_messages(fields.get("messages")),
            template_kwargs=template_kwargs,
            tools=tools,
            calls=calls,
            must_call=must_call,
            sampling=sampling,
            stream=stream,
            returned=returned,
            cache_salt=cache_salt,
            warnings=reasoning_warnings(fields, model.chat_format),
            **read_template(fields),
        )
    check_no_template(fields)
    prompt = fields["prompt"]
    return Generation(
        prompts=(prompt if isinstance(prompt, str) else read_token_ids(prompt, model, "prompt"),),
        sampling=sampling,
        stream=stream,
        returned=returned,
        cache_salt=cache_salt,
    )


def _read_messages(messages: list[dict[str, Any]] | None) -> tuple[dict[str, Any], ...]:
    if not messages:
        state = "missing" if messages is None else "empty"
        raise InvalidRequestError(
            f"messages is {state}; it must hold at least one message", param="messages"
        )
    return tuple(_read_message(message, f"messages.{i}") for i, message in enumerate(messages))


def _read_message(message: dict[str, Any], path: str) -> dict[str, Any]:
    """The message as templates know it: text content, tool arguments as objects, no nulls."""
    read = {name: value for name, value in message.items() if value is not None}
    if "reasoning" in read:
        read.setdefault("reasoning_content", read["reasoning"])
    if "tool_calls" in read:
        read["tool_calls"] = [
            _read_tool_call(call, f"{path}.tool_calls.{i}")
            for i, call in enumerate(read["tool_calls"])
        ]
    if "content" in read:
        kinds = ("text", "refusal") if read["role"] == "assistant" else ("text",)
        read["content"] = _read_content(read["content"], f"{path}.content", kinds)
    elif read["role"] == "assistant" and (read.get("tool_calls") or "function_call" in read):
        read["content"] = None
    else:
        raise InvalidRequestError(
            f"{path}.content is missing; only an assistant that calls tools may leave it out",
            param=f"{path}.content",
        )
    return read


def _read_content(content: str | list[dict[str, Any]], path: str, kinds: tuple[str, ...]) -> str:
    """The text of all parts, which may be of these kinds."""
    if isinstance(content, str):
        return content
    return "".join(_read_part(part, f"{path}.{i}", kinds) for i, part in enumerate(content))


def _read_part(part: dict[str, Any], path: str, kinds: tuple[str, ...]) -> str:
    kind = part.get("type")
    if kind not in kinds:
        named = f"of type {kind[:40]!r}" if isinstance(kind, str) else "without a type"
        raise InvalidRequestError(
            f"{path} is a part {named}; this server takes {' and '.join(kinds)} parts here",
            param=f"{path}.type",
            code="unsupported_parameter",
        )
    text = part.get(kind)
    if not isinstance(text, str):
        raise InvalidRequestError(f"{path}.{kind} must be a string", param=f"{path}.{kind}")
    return text


def _read_tool_call(call: dict[str, Any], path: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(
            f"{path}.function must be an object with a name", param=f"{path}.function"
        )
    return {**call, "function": {**function, "arguments": _read_arguments(function)}}


def _read_arguments(function: dict[str, Any]) -> Any:
    """Templates print arguments as an object; what is none stays the text that the model wrote."""
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        value = parse_json(arguments.encode()) if arguments.strip() else {}
    except InvalidRequestError:
        return arguments
    return value if isinstance(value, dict) else arguments
