"""What a reply with tool calls is made of, in the order in which it comes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """Content; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of tool `name` begins; calls are numbered from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of a call: its pieces join to one JSON object."""

    index: int
    text: str


Piece = Text | CallStart | CallArguments
