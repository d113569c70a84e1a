"""A radix tree of cached prompts: paths of token ids, cut into pages, to the pages of their KV.

The idea is SGLang's RadixAttention (Zheng et al., 2024, arXiv:2312.07104), here with whole pages as
the alphabet: an edge is a run of pages, children differ in their first page, keys are compared as
real token ids. The first page of a path has a salt in its key, so that paths of different salts
have no node in common. A node's `refs` counts the leases pinned at it or below it; a node with refs
0 may be evicted, least recently used leaf first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minisrv.wire.arrays import Int32Array


class Node:
    """An edge with the node at its end. `tokens` has page_size ids for each of `pages`.

    `key` is the node's among the children of its parent.
    """

    __slots__ = (
        "children",
        "fill_step",
        "key",
        "last_step",
        "last_used",
        "pages",
        "parent",
        "refs",
        "tokens",
    )

    def __init__(
        self,
        parent: Node | None,
        key: bytes,
        tokens: Int32Array,
        pages: list[int],
        fill_step: int,
    ) -> None:
        self.parent = parent
        self.key = key
        self.tokens = tokens
        self.pages = pages
        self.children: dict[bytes, Node] = {}
        self.refs = 0
        self.fill_step = fill_step  # the last step that writes these pages
        self.last_step = fill_step  # the last step that may use them
        self.last_used = 0


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix: the pages after those already held, ending at or inside `node`.

    `inside` is how many pages of `node` belong to it. `pending` says that the next pages exist,
    but are written by the step that is being built, so nobody may read them yet.
    """

    node: Node
    inside: int
    pages: list[int]
    pending: bool


class RadixTree:
    """See the module. Page counts are numbers of whole pages; `tokens` start at the root."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.root = Node(None, b"", np.empty(0, np.int32), [], 0)
        self.root.refs = 1
        self.num_evictable = 0
        self.num_pages = 0
        self._clock = 0
        self._pushes = 0
        self._heap: list[tuple[int, int, Node]] = []

    def match(
        self,
        node: Node,
        tokens: Int32Array,
        start: int,
        limit: int,
        step: int,
        salt: bytes = b"",
    ) -> Match:
        """Follow `tokens` down from `node`, which ends `start` pages deep, to at most `limit`."""
        pages: list[int] = []
        inside = len(node.pages)
        while start < limit:
            child = node.children.get(self._key(tokens, start, salt))
            if child is None:
                break
            if child.fill_step == step:
                return Match(node, inside, pages, True)
            inside = self._common_pages(child, tokens, start, limit)
            pages += child.pages[:inside]
            start += inside
            node = child
            if inside < len(child.pages):
                break
        return Match(node, inside, pages, False)

    def insert(
        self,
        node: Node,
        tokens: Int32Array,
        start: int,
        pages: list[int],
        step: int,
        salt: bytes = b"",
    ) -> tuple[Node, int]:
        """Add `pages` for the tokens after page `start`, where `node` ends.

        Returns the node at their end and how many of them the tree already had (with other page
        ids: those of the caller stay the caller's). `step` is the last step that writes the pages.
        """
        end = start + len(pages)
        found = self.match(node, tokens, start, end, -1, salt)
        known = len(found.pages)
        last = self._end_at(found.node, found.inside)
        if known == len(pages):
            return last, known
        child = Node(
            last,
            self._key(tokens, start + known, salt),
            tokens[(start + known) * self.page_size : end * self.page_size].copy(),
            pages[known:],
            step,
        )
        last.children[child.key] = child
        self.num_pages += len(child.pages)
        self.num_evictable += len(child.pages)
        self._touch(child)
        return child, known

    def pin(self, node: Node) -> None:
        """Keep the path to `node` from eviction."""
        for part in self.path(node):
            if part.refs == 0:
                self.num_evictable -= len(part.pages)
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
            self._touch(part)

    def end_of(self, match: Match) -> Node:
        """The node that ends where the match ends; splits an edge when it ends inside."""
        return self._end_at(match.node, match.inside)

    def evict(self, count: int) -> Iterator[tuple[list[int], int]]:
        """Remove up to `count` pages, least recently used first: (pages, last step to use them)."""
        while count > 0 and self._heap:
            last_used, _, node = heapq.heappop(self._heap)
            if node.refs or node.children or node.last_used != last_used or not node.pages:
                continue
            keep = max(0, len(node.pages) - count)
            pages = node.pages[keep:]
            self._cut(node, keep)
            count -= len(pages)
            yield pages, node.last_step

    def path(self, node: Node) -> Iterator[Node]:
        """The node and its parents, without the root."""
        while node.parent is not None:
            yield node
            node = node.parent

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            yield node

    def check(self) -> None:
        """Assert the shape of the tree and its counters; refs are checked by their holders."""
        nodes = list(self.nodes())
        assert self.num_pages == sum(len(node.pages) for node in nodes)
        assert self.num_evictable == sum(len(node.pages) for node in nodes if not node.refs)
        for node in nodes:
            assert node.pages, "a node without pages"
            assert len(node.tokens) == len(node.pages) * self.page_size, "a partial page in a node"
            assert node.parent is not None
            assert node.parent.children.get(node.key) is node, "a wrong child key"
            assert node.key.endswith(self._key(node.tokens, 0, b"")), "a key of other tokens"
            assert node.parent is self.root or len(node.key) == 4 * self.page_size
            assert node.parent is self.root or node.parent.refs >= node.refs
        waiting = {id(node) for used, _, node in self._heap if node.last_used == used}
        for node in nodes:
            assert node.refs or node.children or id(node) in waiting, "a leaf that eviction misses"

    def _key(self, tokens: Int32Array, page: int, salt: bytes) -> bytes:
        """The ids of a page, behind the salt if it is the first: all ids take the same room, so
        that no salt can be taken for ids."""
        ids = tokens[page * self.page_size : (page + 1) * self.page_size].tobytes()
        return ids if page else salt + ids

    def _common_pages(self, child: Node, tokens: Int32Array, start: int, limit: int) -> int:
        pages = min(len(child.pages), limit - start)
        first = start * self.page_size
        ours = tokens[first : first + pages * self.page_size]
        different = np.flatnonzero(child.tokens[: len(ours)] != ours)
        return int(different[0]) // self.page_size if len(different) else pages

    def _end_at(self, node: Node, inside: int) -> Node:
        return node if inside == len(node.pages) else self._split(node, inside)

    def _split(self, node: Node, at: int) -> Node:
        """Put a node before `node` that takes its first `at` pages; holders of `node` keep it."""
        assert node.parent is not None
        assert 0 < at < len(node.pages)
        cut = at * self.page_size
        upper = Node(node.parent, node.key, node.tokens[:cut], node.pages[:at], node.fill_step)
        upper.refs, upper.last_used, upper.last_step = node.refs, node.last_used, node.last_step
        node.parent.children[node.key] = upper
        node.key = self._key(node.tokens, at, b"")
        upper.children[node.key] = node
        node.parent, node.tokens, node.pages = upper, node.tokens[cut:], node.pages[at:]
        return upper

    def _cut(self, node: Node, keep: int) -> None:
        """Drop the pages of a leaf from `keep` on, and the leaf with its last page."""
        removed = len(node.pages) - keep
        self.num_pages -= removed
        self.num_evictable -= removed
        if keep:
            node.pages = node.pages[:keep]
            node.tokens = node.tokens[: keep * self.page_size]
            self._offer(node)
            return
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        node.pages = []
        if parent is not self.root:
            self._offer(parent)

    def _touch(self, node: Node) -> None:
        self._clock += 1
        node.last_used = self._clock
        self._offer(node)

    def _offer(self, node: Node) -> None:
        """Make a leaf a candidate for eviction."""
        if not node.children:
            self._pushes += 1
            heapq.heappush(self._heap, (node.last_used, self._pushes, node))
            if len(self._heap) > 2 * self.num_pages + 64:
                self._heap = [e for e in self._heap if e[2].pages and e[2].last_used == e[0]]
                heapq.heapify(self._heap)
