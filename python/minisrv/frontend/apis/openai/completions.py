"""/v1/completions: the fields of a completion, and its reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.openai.echo import PromptEchoes
from minisrv.frontend.apis.openai.logprobs import read_text_logprobs, text_logprobs
from minisrv.frontend.apis.openai.options import read_common
from minisrv.frontend.apis.openai.render import OpenAIRenderer, ReplyHead, StreamOptions, ending
from minisrv.frontend.fields.names import FieldNames, alias_names
from minisrv.frontend.generation.pieces import Finish, Piece
from minisrv.frontend.generation.renderer import Choice
from minisrv.frontend.generation.request import Prompt, TextRequest, read_token_ids
from minisrv.frontend.registry.events import Event
from minisrv.frontend.registry.model_info import ModelInfo

DEFAULT_MAX_TOKENS = 16


def completion_names(fields: Mapping[str, Any]) -> FieldNames:
    """How the client named fields that have two names."""
    return FieldNames(alias_names(fields))


def read_completion(fields: Mapping[str, Any], model: ModelInfo) -> TextRequest:
    """Read a completion. Raises InvalidRequestError."""
    echo, logprobs = fields.get("echo", False), read_text_logprobs(fields)
    common = read_common(
        fields,
        model,
        max_tokens=fields.get("max_tokens", DEFAULT_MAX_TOKENS),
        echo=echo,
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo else None,
    )
    if fields.get("best_of", 1) not in (1, common["sampling"].n):
        raise InvalidRequestError(
            f"best_of is {fields['best_of']}; this server returns every choice that it "
            "generates, so it must be 1 or n",
            param="best_of",
            code="unsupported_parameter",
        )
    if "prompt" not in fields:
        raise InvalidRequestError("prompt is missing", param="prompt")
    return TextRequest(prompts=_read_prompts(fields["prompt"], model), **common)


def _read_prompts(prompt: Any, model: ModelInfo) -> tuple[Prompt, ...]:
    """The four forms, whose types have been checked."""
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        raise InvalidRequestError("prompt is empty; it must hold a prompt", param="prompt")
    if isinstance(prompt[0], int):
        return (read_token_ids(prompt, model, "prompt"),)
    return tuple(
        item if isinstance(item, str) else read_token_ids(item, model, f"prompt.{i}")
        for i, item in enumerate(prompt)
    )


class CompletionRenderer(OpenAIRenderer):
    """The order of a stream: for each choice chunks with text, then one with the finish reason; the
    usage, if requested; [DONE].
    """

    whole_object = chunk_object = "text_completion"
    text_frame = ('"text":', "")
    delta_name = "text"
    prompt_at_top = False

    def __init__(self, head: ReplyHead, request: TextRequest, options: StreamOptions) -> None:
        super().__init__(head, request, options)
        self._echoes = PromptEchoes(request.prompts, request.sampling.n)

    def whole(self, choices: Sequence[Choice], timings: dict[str, Any] | None) -> dict[str, Any]:
        """The body of a reply that is not streamed."""
        written = []
        for event, pieces in choices:
            if self._tokens is not None:
                self._tokens.collect_prompt(event)
                self._tokens.collect_ids(event)
            finish = pieces[-1]
            assert isinstance(finish, Finish)
            text, logprobs = self._echoes.text_of(event)
            choice = {
                "index": event.index,
                "text": text,
                "logprobs": text_logprobs(logprobs) if logprobs else None,
                **ending(finish),
            }
            written.append(choice)
        return self._whole(written, timings)

    def chunk(self, event: Event, pieces: list[Piece]) -> bytes:
        """The chunks of an event."""
        if self._tokens is not None:
            self._tokens.collect_prompt(event)
            self._tokens.collect_ids(event)
        chunk = b""
        if event.progress is not None:
            chunk = self._chunk(event.index, "", progress=event.progress)
        text, logprobs = self._echoes.text_of(event)
        if logprobs:
            chunk += self._chunk(event.index, text, logprobs=text_logprobs(logprobs))
        elif text:
            plain = self._plain_text
            write = self._text_chunk if plain else self._chunk
            chunk += write(event.index, text)
        if pieces and isinstance(pieces[-1], Finish):
            chunk += self._chunk(event.index, "", finish=pieces[-1])
        return chunk
