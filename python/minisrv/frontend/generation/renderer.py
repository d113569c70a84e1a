"""What an API does to answer a generation: write its pieces in the API's own shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from minisrv.errors import MinisrvError
from minisrv.frontend.generation.event_reader import ChoiceReader, Usage
from minisrv.frontend.generation.pieces import Piece
from minisrv.frontend.generation.request import GenerationRequest
from minisrv.frontend.http.error_format import error_body
from minisrv.frontend.http.sse import DONE, PING, sse
from minisrv.wire.events import Event

Choice = tuple[Event, list[Piece]]


class Renderer(ABC):
    """Writes one reply, either whole or as a stream.

    An Event comes with the pieces read from it; a renderer uses the event for what the pieces do
    not hold, such as logprobs and token ids. `usage` is counted before each call.
    """

    def __init__(self, choices_per_prompt: int = 1) -> None:
        self.usage = Usage(choices_per_prompt)

    @abstractmethod
    def whole(self, choices: Sequence[Choice], timings: dict[str, Any] | None) -> dict[str, Any]:
        """The body of a reply that is not streamed; each choice has one event, in order."""

    @abstractmethod
    def chunk(self, event: Event, pieces: list[Piece]) -> bytes:
        """The bytes that an event adds to the stream; may be empty."""

    def end(self, timings: dict[str, Any] | None) -> bytes:
        """The end of a stream whose choices have all finished."""
        return DONE

    def failed(self, error: MinisrvError) -> bytes:
        """The end of a stream that cannot go on; `error` names the API's own fields."""
        return sse(error_body(error)) + DONE

    def ping(self) -> bytes:
        """What keeps an idle stream open; by default a comment."""
        return PING


def whole_reply(
    request: GenerationRequest,
    renderer: Renderer,
    events: Iterable[Event],
    timings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The body of a reply that is not streamed, from one event without a failure per choice."""
    ordered = sorted(events, key=lambda event: event.index)
    return renderer.whole([read_choice(request, renderer, event) for event in ordered], timings)


def read_choice(request: GenerationRequest, renderer: Renderer, event: Event) -> Choice:
    """Count a choice's only event, and read its pieces."""
    renderer.usage.count(event)
    return event, ChoiceReader(request.calls).read(event)
