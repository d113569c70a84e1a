"""Tracks who owns each page: a running request's lease, the radix tree, or the free pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from minisrv.kvcache.page_pool import IdPool
from minisrv.kvcache.radix_tree import Match, Node, RadixTree
from minisrv.wire.arrays import Int32Array

MAX_RECENT = 4096


@dataclass(slots=True, eq=False, repr=False)
class Lease:
    """A running request's row of the page table.

    `pages[c]` holds positions c * page_size and up. The first `num_shared` pages belong to the
    tree, are read-only and pinned at `node`; the others belong only to this lease. Pages are shared
    only between leases with the same `salt`. Once closed it has no pages, and `node` is where its
    tokens end in the tree.
    """

    row: int
    node: Node
    salt: bytes = b""
    pages: list[int] = field(default_factory=list)
    last_step: int = 0

    @property
    def num_shared(self) -> int:
        return self.node.end

    def __repr__(self) -> str:
        return f"Lease(row {self.row}, {len(self.pages)} pages, {self.num_shared} of them shared)"


@dataclass(slots=True, eq=False)
class Demand:
    """How many of the available pages a prompt takes, remembered while its request waits.

    A cached page that a lease has pinned already costs nothing. One that is not pinned costs one
    page, since it could have been evicted instead. So a demand depends only on the pinned part of
    the match: evictions do not change it, nor do pages that join the tree without a pin. It is
    looked up again when pins have changed, or if it was pending in an earlier step (see Match).
    """

    token_ids: Int32Array
    salt: bytes
    limit: int  # how many pages may come from the cache
    pinned: Match
    num_pages: int = 0
    num_pin_changes: int = -1  # the tree's, when this was looked up


class KVCacheManager:
    """Allocates rows and pages to requests.

    All token ids are int32 arrays that start at position 0. Changes of the page table are collected
    until `take_page_writes`. `recent` are the last leases by uid, closed ones too.
    """

    def __init__(self, num_pages: int, num_rows: int, page_size: int, *, radix_cache: bool) -> None:
        self.page_size = page_size
        self.radix_cache = radix_cache
        self.tree = RadixTree(page_size)
        self.pages = IdPool(num_pages)
        self.rows = IdPool(num_rows)
        self.recent: dict[int, Lease] = {}
        self._page_writes: dict[tuple[int, int], int] = {}

    @property
    def num_available(self) -> int:
        """Pages that are free or can be evicted."""
        return self.pages.num_free + self.tree.num_evictable

    @property
    def num_returning(self) -> int:
        """Pages that become free once the steps in flight have settled."""
        return self.pages.num_quarantined

    def pages_for(self, num_tokens: int) -> int:
        """Pages needed for `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def open_lease(self, salt: bytes = b"", uid: int = -1) -> Lease:
        """A new lease without pages; the caller has checked that a row is free."""
        lease = Lease(row=self.rows.allocate(1)[0], node=self.tree.root, salt=salt)
        self.recent.pop(uid, None)
        self.recent[uid] = lease
        if len(self.recent) > MAX_RECENT:
            del self.recent[next(iter(self.recent))]
        return lease

    def open_demand(
        self, token_ids: Int32Array, salt: bytes = b"", *, uses_cache: bool = True
    ) -> Demand:
        """The demand of a new lease, at least one page. Valid after `update_demand`."""
        limit = (len(token_ids) - 1) // self.page_size if uses_cache else 0
        return Demand(token_ids, salt, limit, Match(self.tree.root, 0, False))

    def update_demand(self, demand: Demand, step: int) -> None:
        """Look a demand up again for the step under construction, if it may have changed."""
        tree, known = self.tree, demand.pinned
        if demand.num_pin_changes == tree.num_pin_changes and not known.pending:
            return
        found = tree.match_pinned(known, demand.token_ids, demand.limit, step, demand.salt)
        demand.num_pages = self.pages_for(len(demand.token_ids)) - found.end
        demand.pinned, demand.num_pin_changes = found, tree.num_pin_changes

    def extend_match(
        self, lease: Lease, token_ids: Int32Array, computed: int, step: int
    ) -> int | None:
        """Replace pages that the lease has not computed yet by cached ones.

        At least one token is left to compute. Returns how many tokens are now in the cache, at
        least `computed`; or None if the next pages are being written by step `step` itself.
        """
        if not self.radix_cache:
            return computed
        limit = (len(token_ids) - 1) // self.page_size
        shared = lease.num_shared
        found = self.tree.match(lease.node, token_ids, limit, step, lease.salt)
        if found.pending:
            return None
        end = found.end
        if end * self.page_size <= computed:
            return computed
        node = self.tree.end_of(found)
        self.tree.pin(node)
        self.tree.unpin(lease.node, lease.last_step)
        self.pages.release(lease.pages[shared:end], lease.last_step)
        pages = self.tree.pages_between(lease.node, node)
        for column, page in enumerate(pages, shared):
            self._page_writes[lease.row, column] = page
        lease.pages[shared:end] = pages
        lease.node = node
        return end * self.page_size

    def grow(self, lease: Lease, num_tokens: int) -> int:
        """Allocate pages for `num_tokens`, evicting if necessary; returns how many tokens fit."""
        missing = self.pages_for(num_tokens) - len(lease.pages)
        if missing > 0:
            self.evict(missing - self.pages.num_free)
            taken = self.pages.allocate(min(missing, self.pages.num_free))
            for column, page in enumerate(taken, len(lease.pages)):
                self._page_writes[lease.row, column] = page
            lease.pages += taken
        return min(num_tokens, len(lease.pages) * self.page_size)

    def share(self, lease: Lease, token_ids: Int32Array, computed: int, step: int) -> None:
        """Move full pages below `computed`, which `step` or an earlier one fills, into the tree.

        If the tree already has such pages, from another request, the lease keeps its own.
        """
        start, end = lease.num_shared, computed // self.page_size
        if not self.radix_cache or end <= start:
            return
        if self.tree.match(lease.node, token_ids, start + 1, -1, lease.salt).end > start:
            return
        own = lease.pages[start:end]
        node, _ = self.tree.insert(lease.node, token_ids, own, step, lease.salt)
        self.tree.pin(node)
        self.tree.unpin(lease.node, lease.last_step)
        lease.node = node

    def close_lease(self, lease: Lease, token_ids: Int32Array, computed: int) -> None:
        """End a lease: full pages below `computed` go into the tree, the others are released."""
        start = lease.num_shared
        end = max(start, computed // self.page_size) if self.radix_cache else start
        known, last = end - start, lease.node
        if known:
            own = lease.pages[start:end]
            last, known = self.tree.insert(lease.node, token_ids, own, lease.last_step, lease.salt)
        self.tree.unpin(lease.node, lease.last_step)
        unused = lease.pages[start : start + known] + lease.pages[end:]
        self.pages.release(unused, lease.last_step)
        self.rows.release([lease.row], lease.last_step)
        for column in range(len(lease.pages)):  # the row's next owner writes its own
            self._page_writes.pop((lease.row, column), None)
        lease.pages, lease.node = [], last

    def evict(self, count: int) -> None:
        """Evict up to `count` unpinned pages from the tree, least recently used first."""
        for pages, last_step in self.tree.evict(count):
            self.pages.release(pages, last_step)

    def settle(self, step: int) -> None:
        """All steps up to `step` are done."""
        self.pages.settle(step)
        self.rows.settle(step)

    def take_page_writes(self) -> dict[tuple[int, int], int]:
        """Changes of the page table since the last call: (row, column) -> page."""
        writes, self._page_writes = self._page_writes, {}
        return writes

    def check(self, leases: Collection[Lease]) -> None:
        """Assert that every page and row has exactly one owner, and every pin a holder."""
        self.tree.check()
        owned = Counter(self.pages.idle_ids())
        owned.update(page for node in self.tree.nodes() for page in node.pages)
        owned.update(page for lease in leases for page in lease.pages[lease.num_shared :])
        assert owned == Counter(range(self.pages.size)), (
            f"pages lost or owned twice: {_miscounted(owned)}"
        )
        rows = Counter(self.rows.idle_ids()) + Counter(lease.row for lease in leases)
        assert rows == Counter(range(self.rows.size)), (
            f"rows lost or owned twice: {_miscounted(rows)}"
        )
        pins: Counter[int] = Counter()
        for lease in leases:
            pins.update(map(id, self.tree.path(lease.node)))
            shared = self.tree.pages_between(self.tree.root, lease.node)
            assert shared == lease.pages[: lease.num_shared], (
                "a lease's pages differ from those of its path"
            )
        for node in self.tree.nodes():
            assert node.refs == pins[id(node)], f"{node!r} has {pins[id(node)]} holders"

    def check_demand(self, demand: Demand, step: int) -> None:
        """Assert that what is remembered of a demand gives the same result as a fresh look."""
        known, fresh = replace(demand), replace(demand, pinned=Match(self.tree.root, 0, False))
        fresh.num_pin_changes = -1
        for copy in (known, fresh):
            self.update_demand(copy, step)
        assert known.num_pages == fresh.num_pages, "a remembered demand is out of date"
        assert known.pinned.pending == fresh.pinned.pending, "a remembered demand is out of date"


def _miscounted(owners: Counter[int]) -> dict[int, int]:
    return {i: count for i, count in owners.items() if count != 1}
