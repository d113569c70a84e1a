"""The kinds of child processes, and which of them make up an engine."""

from __future__ import annotations

from minisrv.config import ServerConfig

MODULES = {
    "frontend": "minisrv.frontend",
    "hub": "minisrv.supervision.prepare",
    "converter": "minisrv.supervision.prepare",
    "scheduler": "minisrv.scheduler",
    "detokenizer": "minisrv.detokenizer",
    "tokenizer": "minisrv.tokenizer",
    "kv_events": "minisrv.kv_events",
}


def workers(config: ServerConfig) -> list[tuple[str, int]]:
    """The kind and index of each process of an engine, in the order of their start."""
    kinds = [("scheduler", 0), ("detokenizer", 0)]
    kinds += [("tokenizer", index) for index in range(config.num_tokenizers)]
    if config.kv_events_endpoint is not None:
        kinds.append(("kv_events", 0))
    return kinds
