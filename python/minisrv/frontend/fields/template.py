"""The fields of a chat that control the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisrv.config import RESERVED_VARIABLES
from minisrv.errors import InvalidRequestError

_ONLY_WITH_MESSAGES = (
    "messages",
    "chat_template_kwargs",
    "tools",
    "reasoning_effort",
    "enable_thinking",
    "continue_final_message",
    "chat_template",
)


def begins_new_turn(begins: bool | None, continues: bool) -> bool:
    """Whether the prompt ends with the start of an assistant turn; yes unless it continues one.

    Raises InvalidRequestError when both are requested.
    """
    if begins and continues:
        raise InvalidRequestError(
            "add_generation_prompt and continue_final_message are both true; send one of them",
            param="continue_final_message",
        )
    return not continues if begins is None else begins


def read_template_kwargs(variables: dict[str, Any]) -> dict[str, Any]:
    """Variables of the client. Raises InvalidRequestError for one that the server sets."""
    for name in RESERVED_VARIABLES:
        if name in variables:
            path = f"chat_template_kwargs.{name}"
            raise InvalidRequestError(f"{path} is set by the server; leave it out", param=path)
    return variables


def check_no_template(fields: Mapping[str, Any]) -> None:
    """Raise InvalidRequestError for a field that has no effect on a prompt without a template."""
    wrong = [name for name in _ONLY_WITH_MESSAGES if fields.get(name)]
    if fields.get("add_generation_prompt") is False:
        wrong.append("add_generation_prompt")
    if wrong:
        raise InvalidRequestError(f"send {wrong[0]} or prompt, not both", param=wrong[0])
