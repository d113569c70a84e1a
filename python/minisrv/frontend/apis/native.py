"""POST /generate: text or token ids in, text and token ids out. Thin, for tests and benchmarks.

The shape is SGLang's, with deltas in a stream: `text` and `output_ids` of all its events join to
those of a whole reply.
"""

from __future__ import annotations

import re
import time
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minisrv.errors import InvalidRequestError, MinisrvError
from minisrv.frontend.apis.openai.render import (
    DONE,
    FINISH_REASONS,
    ReplyHeader,
    StreamOptions,
    sse,
)
from minisrv.frontend.fields.names import Names, rename_fields, renamed
from minisrv.frontend.fields.read_body import BodyFields, supported
from minisrv.frontend.fields.schema import INTEGER, INTEGERS, OBJECT, STRING
from minisrv.frontend.fields.table import COMPLETION_FIELDS, Field, read_fields
from minisrv.frontend.generation.request import (
    Generation,
    check_model,
    read_cache_salt,
    read_sampling,
    read_token_ids,
)
from minisrv.frontend.generation.run import GenerationResponse
from minisrv.frontend.http.context import RequestContext, context_of
from minisrv.frontend.http.openapi import errors, request_body
from minisrv.frontend.ops.metrics import ServerMetrics
from minisrv.frontend.registry.events import Event
from minisrv.frontend.registry.model_info import ModelInfo
from minisrv.frontend.registry.registry import RequestRegistry

_SAMPLING_NAMES = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
    *("ignore_eos", "min_tokens", "skip_special_tokens"),
)
SAMPLING_FIELDS: dict[str, Field] = {
    **{name: COMPLETION_FIELDS[name] for name in _SAMPLING_NAMES},
    "max_new_tokens": supported(INTEGER, "The same as max_tokens. Default: 128."),
}
GENERATE_FIELDS: dict[str, Field] = {
    "text": supported(STRING, "The prompt; or send input_ids."),
    "input_ids": supported(INTEGERS, "The prompt as token ids."),
    "sampling_params": supported(OBJECT, f"Any of {', '.join(SAMPLING_FIELDS)}."),
    **{
        name: COMPLETION_FIELDS[name]
        for name in ("model", "stream", "cache_salt", "request_id", "rid")
    },
}
DEFAULT_MAX_TOKENS = 128
_STREAM = StreamOptions(include_usage=False, continuous_usage=False)


def add_native_route(
    app: FastAPI,
    max_open_requests: int,
    body_fields: BodyFields,
    registry: RequestRegistry,
    metrics: ServerMetrics,
) -> None:
    """The one route."""
    statuses = errors(400, 401, 404, 408, 413, 415, 500, 503)

    @app.post("/generate", openapi_extra=request_body(GENERATE_FIELDS), responses=statuses)
    async def generate(request: Request) -> Response:
        """Continue a prompt."""
        model = registry.model
        fields, headers = await body_fields.read_generation(request, GENERATE_FIELDS)
        context = context_of(request.scope)
        names = sent_names(fields)
        with renamed(names):
            generation = read_native(fields, model)
        generation.check_fits(max_open_requests)
        header = ReplyHeader(
            id=context.request_id,
            chat=False,
            created=int(time.time()),
            model=model.name_for(fields),
            system_fingerprint="",
            choices_per_prompt=1,
        )
        return NativeResponse(registry, generation, header, context, headers, metrics, names=names)


def sent_names(fields: dict[str, Any]) -> Names:
    """What the request calls the fields that errors name."""
    sampling = fields.get("sampling_params", {})
    older = "max_tokens" in sampling and "max_new_tokens" not in sampling
    limit = "max_tokens" if older else "max_new_tokens"
    return (
        (re.compile(r"\bmax_(completion_|new_)?tokens\b"), limit),
        (re.compile(rf"^({'|'.join(SAMPLING_FIELDS)})\b"), r"sampling_params.\1"),
        (re.compile(r"^prompt\b"), "input_ids" if "input_ids" in fields else "text"),
    )


def read_native(fields: dict[str, Any], model: ModelInfo) -> Generation:
    """Check the fields of a request. Raises InvalidRequestError."""
    check_model(fields, model)
    if ("text" in fields) == ("input_ids" in fields):
        raise InvalidRequestError("send either text or input_ids", param="text")
    given, unknown = read_fields(fields.get("sampling_params", {}), SAMPLING_FIELDS)
    if unknown:
        raise InvalidRequestError(
            f"sampling_params has no {unknown[0][:64]!a}; it has {', '.join(SAMPLING_FIELDS)}",
            param=f"sampling_params.{unknown[0][:64]}",
            code="unsupported_parameter",
        )
    if "max_new_tokens" in given:
        given["max_completion_tokens"] = given.pop("max_new_tokens")
    sampling = read_sampling(given | {"return_token_ids": True}, model, DEFAULT_MAX_TOKENS)
    text = fields.get("text")
    return Generation(
        prompts=(
            read_token_ids(fields["input_ids"], model, "input_ids") if text is None else text,
        ),
        sampling=sampling,
        cache_salt=read_cache_salt(fields),
        stream=_STREAM if fields.get("stream", False) else None,
    )


class NativeResponse(GenerationResponse):
    """Answers in the native shape; `names` are those of the request's fields."""

    def __init__(
        self,
        registry: RequestRegistry,
        generation: Generation,
        header: ReplyHeader,
        context: RequestContext,
        headers: dict[str, str],
        metrics: ServerMetrics,
        *,
        names: Names,
    ) -> None:
        super().__init__(registry, generation, header, context, headers, metrics)
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises MinisrvError, in the names that were sent."""
        with renamed(self._names):
            await super().__call__(scope, receive, send)

    def _whole(self, events: list[Event]) -> dict[str, Any]:
        (event,) = events
        return self._body(event)

    def _chunks(self, event: Event) -> bytes:
        return sse(self._body(event)) if event.deltas else b""

    def _end(self) -> bytes:
        return DONE

    def _failed(self, error: MinisrvError) -> bytes:
        rename_fields(error, self._names)
        return super()._failed(error)

    def _body(self, event: Event) -> dict[str, Any]:
        self._usage.add(event)
        finish_reason: dict[str, str | int] | None = None
        if event.final:
            finish_reason = {"type": FINISH_REASONS[event.finish]}
            if event.stop_reason is not None:
                finish_reason["matched"] = event.stop_reason
        meta_info = {
            "id": self._header.id,
            "finish_reason": finish_reason,
            "prompt_tokens": self._usage.prompt_tokens,
            "cached_tokens": self._usage.cached_tokens,
            "completion_tokens": event.output_tokens,
        }
        return {"text": event.text, "output_ids": event.token_ids, "meta_info": meta_info}
