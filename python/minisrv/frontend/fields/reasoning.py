"""Whether and how much the model reasons: variables of the chat template."""

from __future__ import annotations

from typing import Any

from minisrv.checkpoint.chat_format import ChatFormat
from minisrv.errors import InvalidRequestError


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
    if not chat_format.switches_reasoning:
        if enabled is not None:
            _check_fixed(enabled, chat_format, "enable_thinking")
        elif effort == "none":
            _check_fixed(False, chat_format, "reasoning_effort")
        return {} if effort is None else {"reasoning_effort": effort}
    reasons = effort != "none" if enabled is None else enabled
    variables: dict[str, Any] = {"enable_thinking": reasons, "thinking": reasons}
    return variables if effort is None else {**variables, "reasoning_effort": effort}


def effort_warnings(effort: str | None, chat_format: ChatFormat, name: str) -> tuple[str, ...]:
    """A warning about an effort that has no effect; `name` is the field's."""
    if chat_format.switches_reasoning or effort in (None, "none"):
        return ()
    return (f"{name} has no effect: the chat template of this model does not read it",)


def _check_fixed(reasons: bool, chat_format: ChatFormat, name: str) -> None:
    """Without a variable in the template, only the model's fixed behaviour can be requested."""
    if reasons == (chat_format.reasoning_markers is not None):
        return
    state = "always reasons" if chat_format.reasoning_markers else "does not reason"
    raise InvalidRequestError(
        f"{name} is not supported: this model {state}, and its chat template has no switch",
        param=name,
        code="unsupported_parameter",
    )
