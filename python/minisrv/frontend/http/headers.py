"""Names of response headers."""

REQUEST_ID_HEADER = "X-Request-Id"
WARNINGS_HEADER = "X-Minisrv-Warnings"
SERVER_TIMING_HEADER = "Server-Timing"
RETRY_HEADER = "X-Should-Retry"
