"""Deploys the application from a program of its own, and removes it at the end."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from minisrv.errors import MinisrvError
from minisrv.ray.application import make_application, server_config
from minisrv.ray.replica import Replica

NAME = "minisrv"


def serve_until_stopped(args: dict[str, Any], address: str | None) -> None:
    """Serve until SIGINT or SIGTERM, then let the open requests end.

    args: as for `make_application`; `host` and `port` are those of Ray's proxy. address: of a
    cluster, as for ray.init. Raises MinisrvError.
    """
    config, app = server_config(args), make_application(args, Replica)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        ray.init(address=address, include_dashboard=False)
    except Exception as error:  # also if it is Ray's own cluster that takes too long to start
        what = f"no Ray cluster answers at {address}" if address else "Ray could not start"
        raise MinisrvError(f"{what}: {error}") from None
    try:
        serve.start(http_options={"host": config.host, "port": config.port})
        serve.run(app, name=NAME)
        url = f"http://{config.host}:{config.port}"
        sys.stdout.write(f"minisrv listens on {url}, with Ray Serve\n")
        sys.stdout.flush()
        _wait_for_signal()
    except KeyboardInterrupt:
        pass  # while it started
    except RuntimeError as error:
        raise MinisrvError(f"Ray could not start it: {error}") from None
    finally:
        with contextlib.suppress(RayServeException):  # it has not started
            serve.delete(NAME)
        ray.shutdown()


def _wait_for_signal() -> None:
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
