"""Deploys the application from a program of its own, and removes it at the end."""

from __future__ import annotations

import signal
import threading
from typing import Any

import ray
from ray import serve

from minisrv.errors import MinisrvError
from minisrv.ray.application import build, server_config

NAME = "minisrv"


def serve_until_stopped(args: dict[str, Any], address: str | None) -> None:
    """Serve until SIGINT or SIGTERM, then let the open requests end.

    args: as for `make_application`; `host` and `port` are those of Ray's proxy. address: of a
    cluster, as for ray.init. Raises MinisrvError.
    """
    config, app = server_config(args), build(args)
    stopped = threading.Event()
    try:
        ray.init(address=address, include_dashboard=False if address is None else None)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        serve.start(http_options={"host": config.host, "port": config.port})
        serve.run(app, name=NAME)
    except (RuntimeError, ConnectionError) as error:
        ray.shutdown()
        raise MinisrvError(f"Ray could not start it: {error}") from None
    print(f"minisrv listens on http://{config.host}:{config.port}, with Ray Serve", flush=True)
    stopped.wait()
    serve.delete(NAME)
    ray.shutdown()
