"""Requests that schemathesis makes of /openapi.json: ones that fit it and ones that do not."""

from __future__ import annotations

from typing import Any

import hypothesis
import requests
import schemathesis
from schemathesis import Case, GenerationMode

from tests.soak.hostile import Hostile
from tests.soak.hostile_bodies import GOOD_BODIES, LIMITED

# Routes that end other people's requests, or the server.
EXCLUDED = {"/drain", "/abort_request", "/flush_cache"}
MAX_TOKENS = 8
_GOOD = dict(reversed(GOOD_BODIES))


def openapi_cases(document: dict[str, Any], count: int, seed: int) -> list[Hostile]:
    """About `count` requests of all operations; those with a body get most of them."""
    operations = [
        operation
        for found in schemathesis.openapi.from_dict(document).get_all_operations()
        if (operation := found.ok()).path not in EXCLUDED
    ]
    weights = {o: 40 if o.body else 1 for o in operations}
    cases: list[Hostile] = []
    for operation, weight in weights.items():
        share = max(1, round(count * weight / sum(weights.values()) / len(GenerationMode)))
        # Without a body nearly everything is right: schemathesis looks for seconds, in vain.
        modes = list(GenerationMode) if operation.body else [GenerationMode.POSITIVE]
        for mode in modes:
            cases += _cases_of(operation, mode, share, seed)
    return cases


def _cases_of(operation: Any, mode: GenerationMode, count: int, seed: int) -> list[Hostile]:
    cases: list[Hostile] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def collect(case: Case) -> None:
        if len(cases) % 2 and isinstance(case.body, dict):
            # The document does not say which fields are needed; here they are.
            case.body = {**_GOOD.get(case.path, {}), **case.body}
        cases.append(_as_bytes(case))

    collect()
    return cases


def _as_bytes(case: Case) -> Hostile:
    if isinstance(case.body, dict):
        for name in LIMITED & _GOOD.get(case.path, {}).keys():
            # Otherwise many would run to the end of the context.
            limit = case.body.setdefault(name, MAX_TOKENS)
            case.body[name] = min(limit, MAX_TOKENS) if isinstance(limit, int) else limit
    arguments = case.as_transport_kwargs(base_url="http://127.0.0.1")
    names = ("method", "url", "headers", "params", "data", "json", "cookies", "files")
    prepared = requests.Request(**{n: arguments[n] for n in names if n in arguments}).prepare()
    body = prepared.body or b""
    if isinstance(body, str):
        body = body.encode()
    lines = [f"{prepared.method} {prepared.path_url} HTTP/1.1".encode(), b"Host: 127.0.0.1"]
    for name, value in prepared.headers.items():
        lines.append(b": ".join(t if isinstance(t, bytes) else t.encode() for t in (name, value)))
    data = b"\r\n".join([*lines, b"", b""]) + body
    return Hostile("openapi", (data,), for_head=prepared.method == "HEAD")
