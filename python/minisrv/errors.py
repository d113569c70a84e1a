"""Errors that a person can act on. A broken invariant is an assertion and ends the process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a prompt and of the requested output, and the context they do not fit."""

    prompt: int
    output: int
    context: int


class MinisrvError(Exception):
    """An error with a message for the person who can fix it, and its OpenAI error fields.

    lengths: set when a request does not fit the context and the counts are known.
    retry_after_s: when a retry is likely to succeed, if that is known.
    """

    http_status = 500
    error_type = "server_error"
    code: str | None = "internal_error"
    lengths: Lengths | None = None
    retry_after_s: int | None = None

    def __init_subclass__(cls, status: int | None = None, code: str | None = None) -> None:
        """`status` and `code` are those of the class; None leaves them as they are."""
        super().__init_subclass__()
        cls.http_status = status or cls.http_status
        cls.code = code or cls.code

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        error_type: str | None = None,
    ) -> None:
        """`code`, `status` and `error_type` replace those of the class."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.http_status = status or self.http_status
        self.error_type = error_type or self.error_type

    def rename_field(self, name: str) -> None:
        """Call the field `name`, in `param` and where the message begins with the field."""
        if self.param is not None and self.message.startswith(self.param):
            self.message = name + self.message.removeprefix(self.param)
            self.args = (self.message,)
        self.param = name


class InvalidRequestError(MinisrvError, ValueError, status=400):
    """The request is invalid; the message says what, how much, the limit, and the way out."""

    error_type = "invalid_request_error"
    code: str | None = None


class ContextLengthError(InvalidRequestError, code="context_length_exceeded"):
    """Prompt and output together exceed the context. Clients look for words of the message."""

    def __init__(self, lengths: Lengths, part: str, *, param: str | None = None) -> None:
        """part: what the message calls the prompt."""
        room = lengths.context - lengths.prompt
        way_out = f"Please reduce the length of the {part}"
        if room > 0:
            way_out += f", or ask for at most {room} tokens of completion"
        super().__init__(
            f"This model's maximum context length is {lengths.context} tokens. However, you "
            f"requested {lengths.prompt + lengths.output} tokens ({lengths.prompt} in the {part}, "
            f"{lengths.output} in the completion). {way_out} (context_length_exceeded).",
            param=param,
        )
        self.lengths = lengths


class UnauthorizedError(InvalidRequestError, status=401, code="invalid_api_key"):
    """The request has no API key or an unknown one."""


class ForbiddenError(MinisrvError, status=403):
    """The route needs the admin key."""

    error_type = "permission_error"
    code: str | None = None


class HostNotAllowedError(InvalidRequestError, status=421, code="host_not_allowed"):
    """The request has no key, and its Host header may be that of a foreign page."""


class ModelNotFoundError(InvalidRequestError, status=404, code="model_not_found"):
    """The request names a model that is not served."""


class RequestTooLargeError(InvalidRequestError, status=413, code="request_too_large"):
    """The body or the prompt exceeds a size limit."""


class NotReadyError(MinisrvError, status=503, code="server_starting"):
    """The server is starting or stopping; the client may retry later."""


class OverloadedError(MinisrvError, status=503, code="server_overloaded"):
    """A limit on requests is reached; the client may retry later.

    reason: the limit, for the metrics.
    """

    def __init__(self, message: str, *, reason: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class EngineDeadError(MinisrvError, code="engine_dead"):
    """A process of the engine has died; no open request can be finished."""


class RequestFailedError(MinisrvError):
    """The engine refused or failed this request; carries the fields of its error."""

    code: str | None = None


class ConfigError(MinisrvError, ValueError):
    """An option or a model that cannot be used as given. Commands exit with status 2."""


class UnsupportedModelError(ConfigError):
    """The checkpoint needs a feature that minisrv does not implement."""


class DecodeError(MinisrvError):
    """A frame is not a message that its socket may carry."""


class OtherEpochError(DecodeError):
    """A frame is of another epoch than its receiver. epoch: the frame's."""

    def __init__(self, message: str, epoch: int) -> None:
        super().__init__(message)
        self.epoch = epoch
