"""The cache as the answer to a `ShowTreeMsg`."""

from __future__ import annotations

import time
from typing import Any

from minisrv.kvcache.manager import KVCacheManager
from minisrv.kvcache.tree_view import view_tree
from minisrv.wire.messages import ShowTreeMsg


def describe_tree(cache: KVCacheManager, message: ShowTreeMsg, now: float) -> dict[str, Any]:
    """Columns of the nodes, the counts of the cache, and the `seconds` that this took.

    `path` holds the ids of the nodes of `message.uids`, or None if none of these is known.
    `last_use` is in seconds before `now`. `token_ids` are those of the beginnings of all nodes, in
    order, and `num_token_ids` how many belong to each.
    """
    began = time.perf_counter()
    tree = cache.tree
    leases = [cache.recent[uid] for uid in message.uids if uid in cache.recent]
    view = view_tree(tree, message.max_nodes, [lease.node for lease in leases])
    nodes = view.nodes
    answer: dict[str, Any] = {
        "page_size": cache.page_size,
        "num_pages": cache.pages.size,
        "num_used_pages": cache.pages.size - cache.num_available,
        "num_tree_pages": tree.num_pages,
        "num_nodes": len(tree.nodes()),
        "path": view.path if leases else None,
        "id": [node.id for node in nodes],
        "parent": [node.parent.id if node.parent is not None else 0 for node in nodes],
        "pages": [len(node.pages) for node in nodes],
        "pins": [node.refs for node in nodes],
        "last_use": [now - node.last_used_at for node in nodes],
    }
    if message.num_tokens:
        beginnings = [node.tokens[: message.num_tokens].tolist() for node in nodes]
        answer["token_ids"] = [token_id for ids in beginnings for token_id in ids]
        answer["num_token_ids"] = [len(ids) for ids in beginnings]
    answer["seconds"] = time.perf_counter() - began
    return answer
