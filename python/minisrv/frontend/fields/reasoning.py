"""The fields of a chat that say whether and how much the model thinks: template variables."""

from __future__ import annotations

from typing import Any

from minisrv.checkpoint.chat_format import ChatFormat
from minisrv.errors import InvalidRequestError


def read_reasoning(fields: dict[str, Any], chat_format: ChatFormat) -> dict[str, Any]:
    """The variables for the template, by the names that templates use for one and the same.

    `reasoning_effort` turns thinking on, `none` turns it off. Raises InvalidRequestError when the
    fields contradict each other, or ask for what a model cannot whose template has no variable for
    it; but agents send an effort to every model, so that it passes, see `reasoning_warnings`.
    """
    effort: str | None = fields.get("reasoning_effort")
    enabled: bool | None = fields.get("enable_thinking")
    if effort is None and enabled is None:
        return {}
    if effort is not None and enabled is not None and enabled != (effort != "none"):
        raise InvalidRequestError(
            f"reasoning_effort is {effort} and enable_thinking is {str(enabled).lower()}; "
            "send one of them",
            param="reasoning_effort",
        )
    thinks = effort != "none" if enabled is None else enabled
    if not chat_format.switches_reasoning:
        if enabled is not None:
            _check_fixed(enabled, chat_format, "enable_thinking")
        elif effort == "none":
            _check_fixed(False, chat_format, "reasoning_effort")
        return {} if effort is None else {"reasoning_effort": effort}
    variables: dict[str, Any] = {"enable_thinking": thinks, "thinking": thinks}
    return variables if effort is None else {**variables, "reasoning_effort": effort}


def reasoning_warnings(fields: dict[str, Any], chat_format: ChatFormat) -> tuple[str, ...]:
    """What the client is to know of an effort that does nothing."""
    if chat_format.switches_reasoning or fields.get("reasoning_effort", "none") == "none":
        return ()
    return ("reasoning_effort changes nothing: the chat template of this model does not read it",)


def _check_fixed(thinks: bool, chat_format: ChatFormat, name: str) -> None:
    """Without a variable, only what the model does anyway can be asked for."""
    if thinks == (chat_format.reasoning_markers is not None):
        return
    state = "always thinks" if chat_format.reasoning_markers else "does not think"
    raise InvalidRequestError(
        f"{name} cannot be supported: this model {state}, and its chat template has no switch",
        param=name,
        code="unsupported_parameter",
    )
