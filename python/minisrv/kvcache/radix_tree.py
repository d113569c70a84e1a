"""A radix tree of cached prefixes, from token ids (in units of pages) to KV cache pages.

The idea is SGLang's RadixAttention (Zheng et al., 2024, arXiv:2312.07104), here with whole pages as
the alphabet: an edge is a run of pages, siblings differ in their first page, and keys contain the
actual token ids, not a hash. The key of the first page includes a salt, so that paths with
different salts share no node. A node's `refs` counts the leases pinned at it or below it; nodes
with refs 0 may be evicted, least recently used leaf first.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from minisrv.kvcache.tree_changes import NO_PAGE, TreeChanges
from minisrv.wire.arrays import Int32Array


class Node:
    """A node and the edge that leads to it. `tokens` has page_size ids for each of `pages`.

    `key` indexes this node in `parent.children`. Its path from the root has `end` pages. An evicted
    node has no pages. `id` is its own for as long as the tree lives; the root's is 0.
    """

    __slots__ = (
        "children",
        "end",
        "fill_step",
        "id",
        "key",
        "last_step",
        "last_used",
        "last_used_at",
        "pages",
        "parent",
        "refs",
        "tokens",
    )

    def __init__(
        self,
        id: int,
        parent: Node | None,
        key: bytes,
        tokens: Int32Array,
        pages: list[int],
        fill_step: int,
    ) -> None:
        self.id = id
        self.parent = parent
        self.key = key
        self.tokens = tokens
        self.pages = pages
        self.end: int = len(pages) + (parent.end if parent else 0)
        self.children: dict[bytes, Node] = {}
        self.refs = 0
        self.fill_step = fill_step  # the last step that writes these pages
        self.last_step = fill_step  # the last step that may use them
        self.last_used = 0  # by the tree's clock, which counts uses
        self.last_used_at = 0.0

    @property
    def start(self) -> int:
        """Where the parent ends."""
        return self.end - len(self.pages)

    def __repr__(self) -> str:
        return (
            f"Node(pages {self.pages}, {self.refs} refs, {len(self.children)} children, "
            f"filled by step {self.fill_step}, last step {self.last_step})"
        )


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix: `end` pages from the root, the last of them in `node`.

    `pending`: the next pages exist, but are written by the step that is being built, so they cannot
    be read yet.
    """

    node: Node
    end: int
    pending: bool


class RadixTree:
    """`tokens` arguments start at the root; `limit` counts pages.

    `num_pin_changes` grows whenever a node gets its first pin or loses its last. `now`, in
    seconds, is set by the caller and stored as the time of a use. `changes`: where to record what
    joins and leaves the tree, None if nobody follows it.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.root = Node(0, None, b"", np.empty(0, np.int32), [], 0)
        self.root.refs = 1
        self.num_evictable = 0
        self.num_pages = 0
        self.num_pin_changes = 0
        self.now = 0.0
        self.changes: TreeChanges | None = None
        self._nodes: dict[int, Node] = {}  # by id, without the root
        self._last_id = 0
        self._clock = 0
        self._heap_order = 0
        self._heap: list[tuple[int, int, Node]] = []

    def match(
        self,
        node: Node,
        tokens: Int32Array,
        limit: int,
        step: int,
        salt: bytes = b"",
        least_refs: int = 0,
    ) -> Match:
        """Follow `tokens`, which agree with the path to `node`, to at most `limit`.

        Visits only nodes with at least `least_refs` refs.
        """
        end = node.end
        while end < limit:
            child = node.children.get(self._key(tokens, end, salt))
            if child is None or child.refs < least_refs:
                break
            if child.fill_step == step:
                return Match(node, end, True)
            node, end = child, end + self._common_pages(child, tokens, end, limit)
            if end < node.end:
                break
        return Match(node, end, False)

    def match_pinned(
        self, known: Match, tokens: Int32Array, limit: int, step: int, salt: bytes = b""
    ) -> Match:
        """The pinned part of the match from the root, given an earlier result for these `tokens`.

        Compares only tokens beyond the earlier result. It starts at the deepest node of that result
        that is still pinned. This is safe because the tokens on the path to a pinned node do not
        change: no page of it can be evicted, and a split only moves the upper part of an edge to a
        new parent. An evicted node is never pinned again, and its parent ends where it began.
        """
        node = known.node
        while node.parent is not None and (not node.refs or node.start >= known.end):
            node = node.parent
        if known.end < node.end:  # the tokens differ inside this edge, or reach the limit
            return Match(node, known.end, False)
        return self.match(node, tokens, limit, step, salt, least_refs=1)

    def insert(
        self, node: Node, tokens: Int32Array, pages: list[int], step: int, salt: bytes = b""
    ) -> tuple[Node, int]:
        """Add `pages` for the tokens after the end of `node`.

        Returns the node at their end, and how many of the pages the tree already had under other
        ids; the caller keeps those. `step` is the last step that writes the pages.
        """
        end = node.end + len(pages)
        found = self.match(node, tokens, end, -1, salt)
        known = found.end - node.end
        last = self.end_of(found)
        if known == len(pages):
            return last, known
        child = self._add(
            last,
            self._key(tokens, found.end, salt),
            tokens[found.end * self.page_size : end * self.page_size].copy(),
            pages[known:],
            step,
        )
        self.num_pages += len(child.pages)
        self.num_evictable += len(child.pages)
        self._touch(child)
        if self.changes is not None:
            self._record(self.changes, child, salt)
        return child, known

    def pin(self, node: Node) -> None:
        """Protect the path to `node` from eviction."""
        for part in self.path(node):
            if part.refs == 0:
                self.num_evictable -= len(part.pages)
                self.num_pin_changes += 1
            part.refs += 1
            self._touch(part)

    def unpin(self, node: Node, last_step: int) -> None:
        """Undo one `pin`; `last_step` is the last step that used the path."""
        for part in self.path(node):
            part.refs -= 1
            assert part.refs >= 0, "a node was unpinned more often than pinned"
            part.last_step = max(part.last_step, last_step)
            if part.refs == 0:
                self.num_evictable += len(part.pages)
                self.num_pin_changes += 1
            self._touch(part)

    def end_of(self, match: Match) -> Node:
        """The node that ends where the match ends; splits an edge if necessary."""
        node = match.node
        return node if match.end == node.end else self._split(node, match.end - node.start)

    def evict(self, count: int) -> Iterator[tuple[list[int], int]]:
        """Remove up to `count` pages, least recently used first: (pages, last step to use them)."""
        while count > 0 and self._heap:
            last_used, _, node = heapq.heappop(self._heap)
            if node.refs or node.children or node.last_used != last_used or not node.pages:
                continue
            keep = max(0, len(node.pages) - count)
            pages = node.pages[keep:]
            self._truncate(node, keep)
            count -= len(pages)
            if self.changes is not None:
                self.changes.remove(pages)
            yield pages, node.last_step

    def path(self, node: Node) -> Iterator[Node]:
        """The node and its ancestors, without the root."""
        while node.parent is not None:
            yield node
            node = node.parent

    def pages_between(self, top: Node, node: Node) -> list[int]:
        """The pages from the end of `top` to the end of `node`, which is `top` or below it."""
        parts = []
        while node is not top:
            parts.append(node.pages)
            assert node.parent is not None
            node = node.parent
        return [page for part in reversed(parts) for page in part]

    def nodes(self) -> Collection[Node]:
        """All nodes except the root."""
        return self._nodes.values()

    def record_all(self, changes: TreeChanges) -> None:
        """Record the whole tree as changes of an empty one."""
        found = [self.root]
        for node in found:
            if node.parent is not None:
                self._record(changes, node, node.key[: -4 * self.page_size])
            found += node.children.values()

    def check(self) -> None:
        """Assert the tree's invariants and counters; KVCacheManager.check compares refs."""
        nodes, found = list(self.nodes()), [self.root]
        for node in found:
            found += node.children.values()
        assert set(found) == {self.root, *nodes}
        assert self.num_pages == sum(len(node.pages) for node in nodes)
        assert self.num_evictable == sum(len(node.pages) for node in nodes if not node.refs)
        for node in nodes:
            assert node.pages, "a node without pages"
            assert len(node.tokens) == len(node.pages) * self.page_size, "a partial page in a node"
            assert node.parent is not None
            assert node.start == node.parent.end
            assert node.parent.children.get(node.key) is node, "a node is not under its key"
            assert node.key.endswith(self._key(node.tokens, 0, b"")), (
                "a key differs from its tokens"
            )
            assert node.parent is self.root or len(node.key) == 4 * self.page_size
            assert node.parent is self.root or node.parent.refs >= node.refs
        waiting = {id(node) for used, _, node in self._heap if node.last_used == used}
        for node in nodes:
            assert node.refs or node.children or id(node) in waiting, (
                "a leaf that cannot be evicted"
            )

    def _record(self, changes: TreeChanges, node: Node, salt: bytes) -> None:
        assert node.parent is not None
        above = node.parent.pages[-1] if node.parent.pages else NO_PAGE
        changes.store(above, node.pages, node.tokens, salt)

    def _key(self, tokens: Int32Array, page: int, salt: bytes) -> bytes:
        """The ids of a page as bytes, preceded by the salt for the first page. All pages have the
        same length, so a salt cannot be mistaken for ids.
        """
        ids = tokens[page * self.page_size : (page + 1) * self.page_size].tobytes()
        return ids if page else salt + ids

    def _common_pages(self, child: Node, tokens: Int32Array, start: int, limit: int) -> int:
        pages = min(len(child.pages), limit - start)
        first = start * self.page_size
        ours = tokens[first : first + pages * self.page_size]
        different = np.flatnonzero(child.tokens[: len(ours)] != ours)
        return int(different[0]) // self.page_size if len(different) else pages

    def _add(
        self, parent: Node, key: bytes, tokens: Int32Array, pages: list[int], fill_step: int
    ) -> Node:
        """A new node under `key`, where another one may have been."""
        self._last_id += 1
        node = Node(self._last_id, parent, key, tokens, pages, fill_step)
        self._nodes[node.id] = parent.children[key] = node
        return node

    def _split(self, node: Node, at: int) -> Node:
        """Move the first `at` pages of `node` to a new parent; pins on `node` stay valid."""
        assert node.parent is not None
        assert 0 < at < len(node.pages)
        cut = at * self.page_size
        upper = self._add(node.parent, node.key, node.tokens[:cut], node.pages[:at], node.fill_step)
        upper.refs, upper.last_step = node.refs, node.last_step
        upper.last_used, upper.last_used_at = node.last_used, node.last_used_at
        node.key = self._key(node.tokens, at, b"")
        upper.children[node.key] = node
        node.parent, node.tokens, node.pages = upper, node.tokens[cut:], node.pages[at:]
        return upper

    def _truncate(self, node: Node, keep: int) -> None:
        """Keep the first `keep` pages of a leaf; remove the leaf if none is left."""
        removed = len(node.pages) - keep
        node.end -= removed
        self.num_pages -= removed
        self.num_evictable -= removed
        if keep:
            node.pages = node.pages[:keep]
            node.tokens = node.tokens[: keep * self.page_size]
            self._add_to_heap(node)
            return
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        del self._nodes[node.id]
        node.pages, node.tokens = [], np.empty(0, np.int32)
        if parent is not self.root:
            self._add_to_heap(parent)

    def _touch(self, node: Node) -> None:
        self._clock += 1
        node.last_used, node.last_used_at = self._clock, self.now
        self._add_to_heap(node)

    def _add_to_heap(self, node: Node) -> None:
        """Add the node to the eviction heap if it is a leaf. Stale entries are skipped later."""
        if not node.children:
            self._heap_order += 1
            heapq.heappush(self._heap, (node.last_used, self._heap_order, node))
            if len(self._heap) > 2 * self.num_pages + 64:
                self._heap = [e for e in self._heap if e[2].pages and e[2].last_used == e[0]]
                heapq.heapify(self._heap)
