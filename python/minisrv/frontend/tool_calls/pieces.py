"""The pieces of a reply that may call tools, in the order in which they arrive."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """Content; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The reply's call number `index`, counted from 0, begins: it calls tool `name`."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of a call's arguments; a call's pieces join to one JSON object."""

    index: int
    text: str


Piece = Text | ToolCallStart | ToolCallArguments
