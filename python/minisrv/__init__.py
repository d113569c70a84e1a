"""A compact LLM server. Each name below is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisrv.config import ServerConfig
    from minisrv.frontend_manager import FrontendManager
    from minisrv.llm import LLM
    from minisrv.sampling_params import Grammar, SamplingParams

    __version__: str

__all__ = ["LLM", "FrontendManager", "Grammar", "SamplingParams", "ServerConfig", "__version__"]

_HOMES = {
    "LLM": "minisrv.llm",
    "FrontendManager": "minisrv.frontend_manager",
    "Grammar": "minisrv.sampling_params",
    "SamplingParams": "minisrv.sampling_params",
    "ServerConfig": "minisrv.config",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("minisrv")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'minisrv' has no attribute {name!r}")
