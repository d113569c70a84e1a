"""POST /generate: text or token ids in, text and token ids out, for tests and benchmarks.

The shape is SGLang's, with deltas in a stream: `text` and `output_ids` of all its events join to
those of a whole reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from minisrv.errors import InvalidRequestError
from minisrv.frontend.apis.service import Service
from minisrv.frontend.fields.common import REQUEST_FIELDS, SAMPLING_FIELDS, STOP_FIELDS
from minisrv.frontend.fields.names import FieldNames
from minisrv.frontend.fields.schema import INTEGER, INTEGERS, OBJECT, STRING
from minisrv.frontend.fields.table import Field, read_fields, supported
from minisrv.frontend.generation.pieces import Piece, finish_of
from minisrv.frontend.generation.renderer import Choice, Renderer
from minisrv.frontend.generation.request import (
    TextRequest,
    read_common,
    read_prompt_ids,
    read_sampling,
)
from minisrv.frontend.http.context import context_of
from minisrv.frontend.http.openapi import errors, request_body
from minisrv.frontend.http.sse import sse
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.wire.events import Event

PARAMETERS: dict[str, Field] = {
    "max_tokens": supported(INTEGER, "Maximum output tokens, at least 1. Default: 128."),
    "max_new_tokens": supported(INTEGER, "The same as max_tokens."),
    **SAMPLING_FIELDS,
    **STOP_FIELDS,
}
GENERATE_FIELDS: dict[str, Field] = {
    "text": supported(STRING, "The prompt; or send input_ids."),
    "input_ids": supported(INTEGERS, "The prompt as token ids."),
    "sampling_params": supported(OBJECT, f"Any of {', '.join(PARAMETERS)}."),
    **REQUEST_FIELDS,
}
DEFAULT_MAX_TOKENS = 128
_EXAMPLE = {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 20}}


def add_native_route(app: FastAPI, service: Service) -> None:
    statuses = errors(400, 401, 404, 408, 413, 415, 500, 503)

    @app.post(
        "/generate", openapi_extra=request_body(GENERATE_FIELDS, _EXAMPLE), responses=statuses
    )
    async def generate(request: Request) -> Response:
        """Continue a prompt."""
        model = service.registry.model
        fields = await service.bodies.read_generation(request, GENERATE_FIELDS)
        context = context_of(request.scope)
        context.names = native_names(fields)
        generation = read_native(fields, model)
        return service.runner.response(generation, NativeRenderer(context.request_id))


def native_names(fields: Mapping[str, Any]) -> FieldNames:
    """The request's own names of neutral fields."""
    sampling = fields.get("sampling_params", {})
    older = "max_tokens" in sampling and "max_new_tokens" not in sampling
    table = {name: f"sampling_params.{name}" for name in PARAMETERS}
    table["max_tokens"] = f"sampling_params.{'max_tokens' if older else 'max_new_tokens'}"
    return FieldNames({**table, "prompt": "input_ids" if "input_ids" in fields else "text"})


def read_native(fields: Mapping[str, Any], model: ModelInfo) -> TextRequest:
    """Read a request. Raises InvalidRequestError."""
    common = read_common(fields, model)
    if ("text" in fields) == ("input_ids" in fields):
        raise InvalidRequestError("send either text or input_ids", param="text")
    given, unknown = read_fields(fields.get("sampling_params", {}), PARAMETERS)
    if unknown:
        path = f"sampling_params.{unknown[0][:64]}"
        raise InvalidRequestError(
            f"sampling_params has no field {unknown[0][:64]!a}; it has {', '.join(PARAMETERS)}",
            param=path,
            code="unsupported_parameter",
        )
    max_tokens = given.get("max_new_tokens", given.get("max_tokens", DEFAULT_MAX_TOKENS))
    prompt = fields.get("text")
    if prompt is None:
        prompt = read_prompt_ids(fields["input_ids"], model, "prompt", max_tokens)
    return TextRequest(
        prompts=(prompt,),
        sampling=read_sampling(given, model, max_tokens=max_tokens, return_token_ids=True),
        **common,
    )


class NativeRenderer(Renderer):
    """Every event of a stream has the shape of a whole reply; [DONE] ends it."""

    def __init__(self, id: str) -> None:
        super().__init__()
        self._id = id

    def whole(self, choices: Sequence[Choice], timings: dict[str, Any] | None) -> dict[str, Any]:
        ((event, pieces),) = choices
        return self._body(event, pieces)

    def chunk(self, event: Event, pieces: list[Piece]) -> bytes:
        return sse(self._body(event, pieces)) if event.deltas else b""

    def _body(self, event: Event, pieces: Sequence[Piece]) -> dict[str, Any]:
        finish_reason: dict[str, str | int] | None = None
        if finish := finish_of(pieces):
            finish_reason = {"type": finish.reason}
            if finish.stop_reason is not None:
                finish_reason["matched"] = finish.stop_reason
        meta_info = {
            "id": self._id,
            "finish_reason": finish_reason,
            "prompt_tokens": self.usage.prompt_tokens,
            "cached_tokens": self.usage.cached_tokens,
            "completion_tokens": event.output_tokens,
        }
        return {"text": event.text, "output_ids": event.token_ids, "meta_info": meta_info}
