"""The fields of a chat that control the chat template, among them those about reasoning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minisrv.checkpoint.chat_format import ChatFormat
from minisrv.errors import InvalidRequestError
from minisrv.option_values import RESERVED_VARIABLES

_ONLY_WITH_MESSAGES = (
    *("messages", "chat_template_kwargs", "tools", "reasoning_effort", "enable_thinking"),
    *("continue_final_message", "chat_template"),
)


def begins_new_turn(begins: bool | None, continues: bool) -> bool:
    """Whether the prompt ends with the start of an assistant turn; yes unless it continues one.

    Raises InvalidRequestError when both are requested.
    """
    if begins and continues:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt are both true; send one of them",
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
        raise InvalidRequestError(
            f"{wrong[0]} cannot be combined with prompt; send one of them", param=wrong[0]
        )


def reasoning_variables(
    effort: str | None, enabled: bool | None, chat_format: ChatFormat
) -> dict[str, Any]:
    """Template variables for an effort (`none` disables reasoning) and a switch; None is unset.

    Templates use different names for the same variable, so all of them are set. An effort passes
    even if the template has no variable for it, since agents send one to every model.

    Raises InvalidRequestError when the two contradict each other, or when they ask for something
    that the model cannot do.
    """
    if effort is None and enabled is None:
        return {}
    if effort is not None and enabled is not None and enabled != (effort != "none"):
        raise InvalidRequestError(
            f"reasoning_effort is {effort} and enable_thinking is {str(enabled).lower()}; "
            "send one of them",
            param="reasoning_effort",
        )
    variables: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    if chat_format.switches_reasoning:
        reasons = effort != "none" if enabled is None else enabled
        return variables | {"enable_thinking": reasons, "thinking": reasons}
    # Without a switch in the template, only the model's fixed behaviour can be requested.
    always_reasons = chat_format.reasoning_markers is not None
    requested = False if enabled is None and effort == "none" else enabled
    if requested not in (None, always_reasons):
        name = "reasoning_effort" if enabled is None else "enable_thinking"
        state = "always reasons" if always_reasons else "does not reason"
        raise InvalidRequestError(
            f"{name} is not supported: this model {state}, and its chat template has no switch",
            param=name,
            code="unsupported_parameter",
        )
    return variables


def effort_warnings(effort: str | None, chat_format: ChatFormat, name: str) -> tuple[str, ...]:
    """A warning about an effort that has no effect; `name` is the field's."""
    if chat_format.switches_reasoning or effort in (None, "none"):
        return ()
    return (f"{name} has no effect: the chat template of this model does not read it",)
