"""POST /v1/chat/completions/render and /v1/completions/render: requests as the engine gets them.

The form is vLLM's: what a router needs to look a prompt up in its index of cached blocks.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from minisrv.frontend.apis.openai.chat import CHAT_PREFIX, read_chat
from minisrv.frontend.apis.openai.completions import COMPLETION_PREFIX, read_completion
from minisrv.frontend.apis.openai.fields import COMPLETION_FIELDS, chat_fields, field_names
from minisrv.frontend.apis.service import Service
from minisrv.frontend.generation.request import GenerationRequest
from minisrv.frontend.http.context import context_of
from minisrv.frontend.http.openapi import EXAMPLE_MESSAGES, errors, request_body
from minisrv.frontend.http.sse import encode_json
from minisrv.sampling_params import Grammar, SamplingParams
from minisrv.wire.messages import RenderMsg, TokenizeMsg

_EXAMPLE = {"prompt": "Once upon a time"}
_GRAMMARS = {"json_schema": "json", "regex": "regex", "choice": "choice", "lark": "grammar"}
# Names of SamplingParams that vLLM's have too, with the same meaning.
_SAMPLING = (
    *("n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature"),
    *("top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens"),
    *("logprobs", "prompt_logprobs", "skip_special_tokens", "include_stop_str_in_output"),
)


def add_render_routes(app: FastAPI, service: Service) -> None:
    config, registry, bodies = service.config, service.registry, service.bodies
    chat_table = chat_fields(trust_template=config.trust_request_chat_template)
    statuses = errors(400, 401, 404, 408, 413, 415, 503)

    @app.post(
        "/v1/chat/completions/render",
        openapi_extra=request_body(chat_table, {"messages": EXAMPLE_MESSAGES}),
        responses=statuses,
    )
    async def render_chat(request: Request) -> Response:
        """The token ids and sampling parameters of a chat completion, without generation."""
        model = registry.model
        fields = await bodies.read_generation(request, chat_table)
        context_of(request.scope).names = field_names(fields)
        (rendered,) = await _render(service, request, read_chat(fields, model), CHAT_PREFIX)
        return Response(rendered, media_type="application/json")

    @app.post(
        "/v1/completions/render",
        openapi_extra=request_body(COMPLETION_FIELDS, _EXAMPLE),
        responses=statuses,
    )
    async def render_completion(request: Request) -> Response:
        """The token ids and sampling parameters of each prompt, without generation."""
        model = registry.model
        fields = await bodies.read_generation(request, COMPLETION_FIELDS)
        context_of(request.scope).names = field_names(fields)
        completion = read_completion(fields, model, config.max_open_requests)
        rendered = await _render(service, request, completion, COMPLETION_PREFIX)
        return Response(b"[%b]" % b",".join(rendered), media_type="application/json")


async def _render(
    service: Service, request: Request, generation: GenerationRequest, prefix: str
) -> list[bytes]:
    """A JSON object for each prompt. Raises as a generation does before its first token."""
    id = prefix + context_of(request.scope).request_id
    rendered = []
    for i, message in enumerate(generation.tokenize_messages(0)):
        answer = await service.ask(request, _query(message))
        count, room = answer["count"], service.registry.model.max_model_len - answer["count"]
        asked = generation.sampling.max_tokens
        output = room if asked is None else generation.output_cap(count) or asked
        values = {
            "request_id": id if generation.num_prompts == 1 else f"{id}-{i}",
            "features": None,
            "sampling_params": _sampling(generation.sampling, output),
            "model": generation.model,
            "stream": generation.reply.stream,
            "cache_salt": generation.cache_salt or None,
        }
        # The ids may be many; they arrive as JSON.
        rest = encode_json(values).encode().removeprefix(b"{")
        rendered.append(b'{"token_ids":%b,%b' % (answer["ids"], rest))
    return rendered


def _query(message: TokenizeMsg) -> Any:
    return lambda query: RenderMsg(query=query, request=message)


def _sampling(sampling: SamplingParams, max_tokens: int) -> dict[str, Any]:
    """The parameters under vLLM's names."""
    return {
        **{name: getattr(sampling, name) for name in _SAMPLING},
        "max_tokens": max_tokens,
        "logit_bias": {str(bias.token_id): bias.value for bias in sampling.logit_bias} or None,
        "structured_outputs": _structured_outputs(sampling.grammar),
    }


def _structured_outputs(grammar: Grammar | None) -> dict[str, Any] | None:
    if grammar is None:
        return None
    is_json = grammar.kind in ("json_schema", "choice")
    return {_GRAMMARS[grammar.kind]: json.loads(grammar.text) if is_json else grammar.text}
