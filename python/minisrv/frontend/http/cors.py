"""Which web pages may call: Starlette's CORS middleware, with refusals as error objects."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from minisrv.errors import InvalidRequestError
from minisrv.frontend.http.context import REQUEST_ID_HEADER, WARNINGS_HEADER
from minisrv.frontend.http.errors import RETRY_HEADER, ErrorResponse


class PagesMiddleware(CORSMiddleware):
    """Answers preflights, which carry no key, and lets pages of `origins` read the responses."""

    def __init__(self, app: ASGIApp, origins: str, id_headers: Sequence[str]) -> None:
        """id_headers: further headers that carry the request id."""
        headers = (REQUEST_ID_HEADER, *id_headers, WARNINGS_HEADER, RETRY_HEADER)
        super().__init__(
            app,
            allow_origins=[origin.strip() for origin in origins.split(",")],
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[*headers, "Server-Timing", "Retry-After"],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Tell a browser whether a page may send its request."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        sentence = f"{bytes(response.body).decode()}; see --cors-origins; allowed methods: "
        error = InvalidRequestError(sentence + ", ".join(self.allow_methods))
        kept = {k: v for k, v in response.headers.items() if not k.startswith("content-")}
        return ErrorResponse(error, kept)
