"""Several servers as replicas of Ray Serve: `minisrv ray CONFIG` or `serve run minisrv.ray:app`.

Options come from the environment (MINISRV_MODEL and so on), or from the command line with
`serve run minisrv.ray:build model=demo num_replicas=2`. Ray is imported when one of the two is
asked for.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("app", "build"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from minisrv.ray.application import build

    return build if name == "build" else build({})
