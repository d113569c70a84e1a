"""The application: how many replicas, what Ray reserves for each, and how they are chosen."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from minisrv.config import ENV_PREFIX, ServerConfig
from minisrv.errors import ConfigError
from minisrv.option_values import flag
from minisrv.ray.autoscaling import QueuedTokensPolicy
from minisrv.ray.ingress import Ingress
from minisrv.ray.replica import Replica

ROUTERS = {
    "cost": "minisrv.ray.request_router:CostRequestRouter",
    "power-of-two": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
}
STATS_PERIOD_S = 0.5
SHUTDOWN_MARGIN_S = 10.0  # beyond --drain-timeout
TARGET_QUEUED_TOKENS = 8192.0
_OWN = frozenset(
    {
        *("num_replicas", "max_replicas", "target_ongoing_requests", "target_queued_tokens"),
        *("upscale_delay_s", "downscale_delay_s", "router", "num_cpus", "num_gpus"),
    }
)
_OF_THE_PROXY = ("host", "port")
_MAY_BE_ZERO = frozenset({"num_cpus", "num_gpus", "upscale_delay_s", "downscale_delay_s"})


def build(args: dict[str, Any]) -> Application:
    """The application for `serve run`: see `make_application`. Raises ConfigError."""
    if any(name in args for name in _OF_THE_PROXY):
        raise ConfigError(
            "host and port are those of Ray's proxy: give them to `serve start` as --http-host and "
            "--http-port, or use `minisrv ray`"
        )
    return make_application(args, Replica)


def make_application(args: dict[str, Any], replica: type[Replica]) -> Application:
    """An ingress, and replicas that are whole servers.

    args: num_replicas (1); max_replicas, with which their number follows the load (see
    `_scaling`); router (cost or power-of-two); num_cpus (1) and num_gpus (--tp with --device cuda,
    otherwise 0) that Ray reserves for a replica; everything else is an option of the server.
    Raises ConfigError.
    """
    config = server_config(args)
    router = str(args.get("router", "cost"))
    if router not in ROUTERS:
        raise ConfigError(f"router is {router!r}; it must be one of {', '.join(ROUTERS)}")
    _refuse_what_has_no_effect(args, config)
    num_gpus = _number(args, "num_gpus", config.tp if config.device == "cuda" else 0)
    replicas = serve.deployment(replica).options(
        name="minisrv",
        **_scaling(args),
        ray_actor_options={"num_cpus": _number(args, "num_cpus", 1), "num_gpus": num_gpus},
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


def server_config(args: dict[str, Any]) -> ServerConfig:
    """The options of the server in args; strings are read as in the environment.

    Raises ConfigError.
    """
    known = {field.name for field in fields(ServerConfig)} | _OWN
    if unknown := sorted(args.keys() - known):
        raise ConfigError(f"no option is called {', '.join(unknown)}")
    environ, values = dict(os.environ), dict[str, Any]()
    for name, value in args.items():
        if name in _OWN:
            continue
        if isinstance(value, str):
            environ[ENV_PREFIX + name.upper()] = value
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return ServerConfig.from_environment(environ, **values)
    except ConfigError as error:
        for name in args:
            for shown in (ENV_PREFIX + name.upper(), flag(name)):
                if error.message.startswith(f"{shown} is "):
                    raise ConfigError(name + error.message.removeprefix(shown)) from None
        raise


def _scaling(args: dict[str, Any]) -> dict[str, Any]:
    """num_replicas, or with max_replicas between the two as many as QueuedTokensPolicy wants.

    target_queued_tokens (TARGET_QUEUED_TOKENS) and target_ongoing_requests (32) are those of a
    replica; upscale_delay_s (30) and downscale_delay_s (600) must pass before the number changes.
    Raises ConfigError.
    """
    least = int(_number(args, "num_replicas", 1))
    if "max_replicas" not in args:
        return {"num_replicas": least}
    most = int(_number(args, "max_replicas", least))
    if most < least:
        raise ConfigError(f"max_replicas is {most}, less than num_replicas ({least})")
    target_tokens = _number(args, "target_queued_tokens", TARGET_QUEUED_TOKENS)
    policy = AutoscalingPolicy(
        policy_function=f"{QueuedTokensPolicy.__module__}:{QueuedTokensPolicy.__name__}",
        policy_kwargs={"target_queued_tokens": target_tokens},
    )
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            target_ongoing_requests=_number(args, "target_ongoing_requests", 32),
            upscale_delay_s=_number(args, "upscale_delay_s", 30),
            downscale_delay_s=_number(args, "downscale_delay_s", 600),
            policy=policy,
        )
    }


def _refuse_what_has_no_effect(args: dict[str, Any], config: ServerConfig) -> None:
    """Raises ConfigError."""
    if config.ssl_certfile is not None:
        raise ConfigError(
            "ssl_certfile has no effect with Ray, whose proxy accepts the connections; put a proxy "
            "with HTTPS in front of it"
        )
    most = max(_number(args, name, 1) for name in ("num_replicas", "max_replicas"))
    if config.kv_events_endpoint is not None and most > 1:
        raise ConfigError(
            "kv_events_endpoint is an address that only one server can have; with several replicas "
            "leave it out"
        )


def _number(args: dict[str, Any], name: str, default: float) -> float:
    """Raises ConfigError."""
    try:
        value = float(args.get(name, default))
    except (TypeError, ValueError):
        value = -1.0
    least = 0.0 if name in _MAY_BE_ZERO else 1.0
    if not least <= value < float("inf"):
        raise ConfigError(f"{name} is {args[name]!r}; it must be a number from {least:g} on")
    return value
