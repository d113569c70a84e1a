"""The typed pieces of a reply, from which every API writes its own shape.

For each choice: Reasoning, then Text and calls in the order in which the model writes them (a call
is a ToolCallStart and its ToolCallArguments), then one Finish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minisrv.frontend.tool_calls.pieces import Text as Text
from minisrv.frontend.tool_calls.pieces import ToolCallArguments as ToolCallArguments
from minisrv.frontend.tool_calls.pieces import ToolCallStart as ToolCallStart

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Reasoning text; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a choice.

    reason: `tool_calls` if the client is to run the calls, none of which is cut off.
    stop_reason: the stop string or the token id that ended the text, if one did.
    in_call: the text ended inside a call.
    """

    reason: FinishReason
    stop_reason: str | int | None = None
    in_call: bool = False


Piece = Reasoning | Text | ToolCallStart | ToolCallArguments | Finish


def finish_of(pieces: Sequence[Piece]) -> Finish | None:
    """The Finish of a choice, if `pieces` are its last ones."""
    last = pieces[-1] if pieces else None
    return last if isinstance(last, Finish) else None
