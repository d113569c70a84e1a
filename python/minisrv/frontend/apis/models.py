"""GET /v1/models, in one body for the clients of OpenAI and of Anthropic."""

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import FastAPI, Path

from minisrv.frontend.generation.request import model_not_found
from minisrv.frontend.http.openapi import errors
from minisrv.frontend.registry.registry import RequestRegistry


def add_model_routes(app: FastAPI, registry: RequestRegistry, served_name: str) -> None:
    def described(name: str) -> dict[str, Any]:
        model = registry.model
        if name not in model.names:
            raise model_not_found(name, model)
        return {
            "id": name,
            "object": "model",
            "created": model.created,
            "owned_by": "minisrv",
            "max_model_len": model.max_model_len,
            "type": "model",
            "display_name": name,
            "created_at": datetime.fromtimestamp(model.created, UTC).isoformat(),
            "lifecycle": "active",
            "max_input_tokens": model.max_model_len,
        }

    @app.get("/v1/models", responses=errors(503))
    async def list_models() -> dict[str, Any]:
        """The served model, under each of its names."""
        names = registry.model.names
        return {
            "object": "list",
            "data": [described(name) for name in names],
            "has_more": False,
            "first_id": names[0],
            "last_id": names[-1],
        }

    @app.get("/v1/models/{model_id:path}", responses=errors(404, 503))
    async def retrieve_model(
        model_id: Annotated[str, Path(openapi_examples={"served": {"value": served_name}})],
    ) -> dict[str, Any]:
        """The served model, by name."""
        return described(model_id)
