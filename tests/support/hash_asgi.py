"""minisrv.asgi with the hash scheduler, for an ASGI server that imports it in each worker."""

from minisrv.supervision import supervisor

supervisor.MODULES["scheduler"] = "tests.support.hash_scheduler"

from minisrv.asgi import app  # noqa: E402

__all__ = ["app"]
