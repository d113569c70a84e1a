"""Failures that a person can act on. A broken invariant is an assertion and ends the process."""

from __future__ import annotations


class MinisrvError(Exception):
    """A failure with a sentence for the person who can mend it, and its OpenAI error fields."""

    http_status = 500
    error_type = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequestError(MinisrvError, ValueError):
    """The request is wrong: what, how much, the limit, the way out."""

    http_status = 400
    error_type = "invalid_request_error"
    code: str | None = None


class UnauthorizedError(InvalidRequestError):
    """The request has no key, or one that the server does not know."""

    http_status = 401
    code = "invalid_api_key"


class ForbiddenError(MinisrvError):
    """The route is for administrators."""

    http_status = 403
    error_type = "permission_error"
    code: str | None = None


class ModelNotFoundError(InvalidRequestError):
    """The request names a model that is not served."""

    http_status = 404
    code = "model_not_found"


class RequestTooLargeError(InvalidRequestError):
    """The body or the prompt is over a size limit."""

    http_status = 413
    code = "request_too_large"


class NotReadyError(MinisrvError):
    """The server is starting or stopping; the same request may pass later."""

    http_status = 503
    code = "server_starting"


class OverloadedError(MinisrvError):
    """A queue is full; the same request may pass later."""

    http_status = 503
    code = "server_overloaded"


class EngineDeadError(MinisrvError):
    """A process behind the frontend has died: no open request can be finished."""

    http_status = 500
    code = "engine_dead"


class RequestFailedError(MinisrvError):
    """A process behind the frontend refused or lost this one request; carries its reply."""

    def __init__(
        self, message: str, *, status: int, error_type: str, code: str | None, param: str | None
    ) -> None:
        super().__init__(message, param=param)
        self.http_status = status
        self.error_type = error_type
        self.code = code


class ConfigError(MinisrvError, ValueError):
    """An option or a model that cannot be used as given. Commands exit with status 2."""


class UnsupportedModelError(ConfigError):
    """The checkpoint needs something that minisrv does not implement."""


class DecodeError(MinisrvError):
    """A frame on a socket is not a message that the socket may carry."""
