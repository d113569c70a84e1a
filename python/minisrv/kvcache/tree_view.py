"""A picture of the radix tree for people: its most used nodes, and the paths of some requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from minisrv.kvcache.radix_tree import Node, RadixTree

_CLOCK_BITS = 44


@dataclass(frozen=True, slots=True)
class TreeView:
    """nodes: with the parent of each, except the root. path: ids from the root downward."""

    nodes: list[Node]
    path: list[int]


def view_tree(tree: RadixTree, max_nodes: int, ends: Iterable[Node]) -> TreeView:
    """Up to `max_nodes` nodes: first the paths to `ends`, then the most used ones.

    A node is used more than another if more leases are pinned at it or below it, or as many and it
    was used later.
    """
    path: dict[Node, None] = {}
    for end in ends:
        path.update(dict.fromkeys(reversed([node for node in tree.path(end) if node.pages])))
    nodes = list(tree.nodes())
    if len(nodes) > max_nodes:
        nodes = _with_parents([*path, *_most_used(nodes, max_nodes)], max_nodes)
    return TreeView(nodes, [node.id for node in path])


def _most_used(nodes: list[Node], count: int) -> Iterator[Node]:
    """The `count` most used of `nodes`, in order; numpy sorts them, since there may be many."""
    keys = -np.array([node.refs << _CLOCK_BITS | node.last_used for node in nodes])
    chosen = np.argpartition(keys, count)[:count]
    for i in chosen[np.argsort(keys[chosen])].tolist():
        yield nodes[i]


def _with_parents(nodes: Iterable[Node], max_nodes: int) -> list[Node]:
    """The first nodes that fit, each after its ancestors, even those that `nodes` has not."""
    found: dict[Node, None] = {}
    for node in nodes:
        missing: list[Node] = []
        while node.parent is not None and node not in found:
            missing.append(node)
            node = node.parent
        if len(found) + len(missing) > max_nodes:
            break
        found.update(dict.fromkeys(reversed(missing)))
    return list(found)
