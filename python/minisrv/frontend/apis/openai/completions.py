"""POST /v1/completions: reads a completion's fields, and writes its reply."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.openai.fields import Fields, read_generation
from minisrv.frontend.apis.openai.logprobs import echo_logprobs, moved_logprobs, text_logprobs
from minisrv.frontend.apis.openai.render import NO_OPTIONS, OpenAIRenderer
from minisrv.frontend.generation.pieces import Piece, finish_of
from minisrv.frontend.generation.request import TextRequest, check_num_choices, read_prompt_ids
from minisrv.frontend.http.sse import encode_json
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.wire.events import Event
from minisrv.wire.logprobs import SpelledLogprobs

COMPLETION_PREFIX = "cmpl-"
DEFAULT_MAX_TOKENS = 16


def read_completion(
    fields: Fields, model: ModelInfo, max_choices: int = sys.maxsize
) -> TextRequest:
    """Read a completion. Raises InvalidRequestError, before it reads more than `max_choices`."""
    echo, logprobs = fields.get("echo", False), fields.get("logprobs")
    max_tokens = fields.get("max_tokens", DEFAULT_MAX_TOKENS)
    common = read_generation(
        fields,
        model,
        max_tokens=max_tokens,
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
    prompts = _list_prompts(fields["prompt"])
    check_num_choices(len(prompts), common["sampling"].n, max_choices)
    return TextRequest(
        prompts=tuple(
            prompt if isinstance(prompt, str) else read_prompt_ids(prompt, model, path, max_tokens)
            for path, prompt in prompts
        ),
        **common,
    )


def _list_prompts(prompt: Any) -> list[tuple[str, str | list[int]]]:
    """The prompts and their paths. There are four forms, whose types have been checked."""
    if not prompt and prompt != "":
        raise InvalidRequestError("prompt is empty; it must hold a prompt", param="prompt")
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [("prompt", prompt)]
    return [(f"prompt.{i}", item) for i, item in enumerate(prompt)]


class CompletionRenderer(OpenAIRenderer):
    """The order of a stream: for each choice chunks with text, then one with the finish reason; the
    usage, if requested; [DONE].
    """

    whole_object = chunk_object = "text_completion"
    text_frame = ('"text":', "")
    delta_name = "text"
    prompt_at_top = False

    def __init__(
        self,
        request_id: str,
        system_fingerprint: str,
        request: TextRequest,
        stream_options: Mapping[str, bool | None] = NO_OPTIONS,
    ) -> None:
        id = COMPLETION_PREFIX + request_id
        super().__init__(id, system_fingerprint, request, stream_options)
        self._prompts_sent = request.prompts
        self._moved_by: dict[int, int] = {}

    def _content(self, event: Event, pieces: Sequence[Piece]) -> dict[str, Any]:
        text, logprobs = self._text_of(event)
        return {"text": text, "logprobs": text_logprobs(logprobs) if logprobs else None}

    def chunk(self, event: Event, pieces: list[Piece]) -> bytes:
        if event.start is not None:
            self._keep_prompt(event)
        if self._shows_ids:
            self._token_ids[event.index] += event.token_ids
        chunk = b""
        if event.progress is not None:
            chunk = self._chunk(event.index, "", progress=event.progress)
        text, logprobs = self._text_of(event)
        if logprobs:
            chunk += self._chunk(event.index, text, logprobs=text_logprobs(logprobs))
        elif text and self._plain_text:
            before, after = self._frames[event.index]
            chunk += before + encode_json(text).encode() + after
        elif text:
            chunk += self._chunk(event.index, text)
        if event.final:
            chunk += self._chunk(event.index, "", finish=finish_of(pieces))
        return chunk

    def _text_of(self, event: Event) -> tuple[str, list[SpelledLogprobs]]:
        """Text and logprobs of an event, after the prompt if that is echoed.

        A text prompt is echoed as the client sent it.
        """
        if event.echo is None:
            moved_by = self._moved_by.get(event.index, 0)
            logprobs = event.logprobs
            return event.text, moved_logprobs(logprobs, moved_by) if moved_by else logprobs
        echo, sent = event.echo, self._prompts_sent[event.index // self._request.sampling.n]
        logprobs = [] if echo.logprobs is None else [echo.logprobs]
        if not isinstance(sent, str):
            return echo.text + event.text, logprobs + event.logprobs
        # Offsets of the output were counted after the text that the prompt's tokens spell.
        moved_by = self._moved_by[event.index] = len(sent) - len(echo.text)
        logprobs = [echo_logprobs(part, sent) for part in logprobs]
        return sent + event.text, logprobs + moved_logprobs(event.logprobs, moved_by)
