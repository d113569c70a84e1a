"""The fields of a chat that say how the template is applied."""

from __future__ import annotations

from typing import Any

from minisrv.config import RESERVED_VARIABLES
from minisrv.errors import InvalidRequestError

# No template is applied to a prompt.
_ONLY_WITH_MESSAGES = (
    "messages",
    "chat_template_kwargs",
    "tools",
    "reasoning_effort",
    "enable_thinking",
    "continue_final_message",
    "chat_template",
)


def read_template(fields: dict[str, Any]) -> dict[str, Any]:
    """The template and where it ends the prompt, as fields of a Generation.

    The assistant's turn is begun unless the last message is to be continued.
    Raises InvalidRequestError.
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
        "chat_template": fields.get("chat_template"),
    }


def read_template_kwargs(variables: dict[str, Any]) -> dict[str, Any]:
    """More variables for the template. Raises InvalidRequestError for one that the server sets."""
    for name in RESERVED_VARIABLES:
        if name in variables:
            raise InvalidRequestError(
                f"chat_template_kwargs may not set {name}", param=f"chat_template_kwargs.{name}"
            )
    return variables


def check_no_template(fields: dict[str, Any]) -> None:
    """Raise InvalidRequestError for a field that only messages can have beside a prompt."""
    wrong = [name for name in _ONLY_WITH_MESSAGES if fields.get(name)]
    if fields.get("add_generation_prompt") is False:
        wrong.append("add_generation_prompt")
    if wrong:
        raise InvalidRequestError(f"send {wrong[0]} or prompt, not both", param=wrong[0])
