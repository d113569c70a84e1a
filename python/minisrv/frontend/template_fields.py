"""The fields of a chat that say how the template is applied."""

from __future__ import annotations

from typing import Any

from minisrv.errors import InvalidRequestError

# What a prompt cannot have: no template is applied to it.
TEMPLATE_FIELDS = (
    "chat_template_kwargs",
    "tools",
    "reasoning_effort",
    "enable_thinking",
    "continue_final_message",
    "chat_template",
)
# What the server gives the template itself.
_RESERVED_VARIABLES = (
    "messages",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
)


def read_turn(fields: dict[str, Any]) -> dict[str, Any]:
    """Where the prompt ends, as fields of a Generation: the assistant's turn is begun unless the
    last message is to be continued. Raises InvalidRequestError.
    """
    begins: bool | None = fields.get("add_generation_prompt")
    continues: bool = fields.get("continue_final_message", False)
    if begins and continues:
        raise InvalidRequestError(
            "add_generation_prompt and continue_final_message are both true; send one of them",
            param="continue_final_message",
        )
    return {
        "add_generation_prompt": not continues if begins is None else begins,
        "continue_final_message": continues,
    }


def read_template_kwargs(variables: dict[str, Any]) -> dict[str, Any]:
    """More variables for the template. Raises InvalidRequestError for one that the server sets."""
    for name in _RESERVED_VARIABLES:
        if name in variables:
            raise InvalidRequestError(
                f"chat_template_kwargs may not set {name}", param=f"chat_template_kwargs.{name}"
            )
    return variables


def check_no_template(fields: dict[str, Any]) -> None:
    """Raise InvalidRequestError for a field that only messages can have beside a prompt."""
    names = ("messages", *TEMPLATE_FIELDS)
    wrong = [name for name in names if fields.get(name)]
    if fields.get("add_generation_prompt") is False:
        wrong.append("add_generation_prompt")
    if wrong:
        raise InvalidRequestError(f"send {wrong[0]} or prompt, not both", param=wrong[0])
