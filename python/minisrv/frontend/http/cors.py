"""Which pages in browsers may call: Starlette's middleware, with refusals in the one form."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from minisrv.errors import InvalidRequestError
from minisrv.frontend.fields.read_body import WARNINGS_HEADER
from minisrv.frontend.generation.run import SERVER_TIMING_HEADER
from minisrv.frontend.http.context import ANTHROPIC_ID_HEADER, REQUEST_ID_HEADER
from minisrv.frontend.http.errors import RETRY_HEADER, error_response


class PagesMiddleware(CORSMiddleware):
    """Answers preflights, which have no key, and lets pages of `origins` read the responses."""

    def __init__(self, app: ASGIApp, origins: str) -> None:
        super().__init__(
            app,
            allow_origins=[origin.strip() for origin in origins.split(",")],
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[
                REQUEST_ID_HEADER,
                ANTHROPIC_ID_HEADER,
                WARNINGS_HEADER,
                SERVER_TIMING_HEADER,
                RETRY_HEADER,
                "Retry-After",
            ],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Whether a page may send what it is about to send."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        text = bytes(response.body).decode()
        kept = {k: v for k, v in response.headers.items() if not k.startswith("content-")}
        error = InvalidRequestError(
            f"{text}; --cors-origins names the pages that may call, with "
            f"{', '.join(self.allow_methods)}"
        )
        return error_response(error, kept)
