"""The application: how many replicas, what Ray reserves for each, and how they are chosen."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from minisrv.config import ENV_PREFIX, ServerConfig
from minisrv.errors import ConfigError
from minisrv.ray.ingress import Ingress
from minisrv.ray.replica import Replica

ROUTERS = {
    "cost": "minisrv.ray.request_router:CostRequestRouter",
    "power-of-two": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
}
STATS_PERIOD_S = 0.5
SHUTDOWN_MARGIN_S = 10.0  # beyond --drain-timeout
_OWN = frozenset({"num_replicas", "max_replicas", "target_ongoing_requests", "router"}) | {
    "num_cpus",
    "num_gpus",
}


def build(args: dict[str, Any]) -> Application:
    """The application for `serve run`: see `make_application`."""
    return make_application(args, Replica)


def make_application(args: dict[str, Any], replica: type[Replica]) -> Application:
    """An ingress, and replicas that are whole servers.

    args: num_replicas (1); max_replicas, with which their number follows the open requests, and
    target_ongoing_requests (32) of each; router (cost or power-of-two); num_cpus (1) and num_gpus
    (--tp with --device cuda, otherwise 0) that Ray reserves for a replica; everything else is an
    option of the server. Raises ConfigError.
    """
    known = {field.name for field in fields(ServerConfig)} | _OWN
    if unknown := sorted(args.keys() - known):
        raise ConfigError(f"no option is called {', '.join(unknown)}")
    options = {ENV_PREFIX + k.upper(): str(v) for k, v in args.items() if k not in _OWN}
    config = ServerConfig.from_environment({**os.environ, **options})
    router = str(args.get("router", "cost"))
    if router not in ROUTERS:
        raise ConfigError(f"router is {router!r}; it must be one of {', '.join(ROUTERS)}")
    least = int(args.get("num_replicas", 1))
    num_gpus = float(args.get("num_gpus", config.tp if config.device == "cuda" else 0))
    scaling: dict[str, Any] = {"num_replicas": least}
    if "max_replicas" in args:
        scaling = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": int(args["max_replicas"]),
                "target_ongoing_requests": float(args.get("target_ongoing_requests", 32)),
            }
        }
    replicas = serve.deployment(replica).options(
        name="minisrv",
        **scaling,
        ray_actor_options={"num_cpus": float(args.get("num_cpus", 1)), "num_gpus": num_gpus},
        # A server has limits of its own, and refuses with a reason.
        max_ongoing_requests=2 * config.max_open_requests,
        graceful_shutdown_timeout_s=config.drain_timeout + SHUTDOWN_MARGIN_S,
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTERS[router], request_routing_stats_period_s=STATS_PERIOD_S
        ),
    )
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name="ingress",
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=config.drain_timeout + SHUTDOWN_MARGIN_S,
    )
    return ingress.bind(replicas.bind(config.to_dict()), config.max_body_bytes)
