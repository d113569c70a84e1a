"""The tree gives back exactly the pages of the longest cached prefix, and forgets the oldest."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minisrv.kvcache.radix_tree import Match, Node, RadixTree

NOBODY = -1
# The last two look like token ids.
SALTS = st.sampled_from([b"", b"a", b"ab", b"\0\0\0\0", b"\1\0\0\0"])


def array(tokens: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(tokens, np.int32)


def insert(tree: RadixTree, tokens: list[int], pages: list[int], step: int = 0) -> Node:
    return tree.insert(tree.root, array(tokens), pages, step)[0]


def found(tree: RadixTree, tokens: list[int], step: int = NOBODY, salt: bytes = b"") -> list[int]:
    limit = len(tokens) // tree.page_size
    return matched(tree, tree.match(tree.root, array(tokens), limit, step, salt))


def matched(tree: RadixTree, match: Match) -> list[int]:
    """The pages of a match."""
    return tree.pages_between(tree.root, match.node)[: match.end]


def evicted(tree: RadixTree, count: int) -> list[int]:
    return [page for pages, _ in tree.evict(count) for page in pages]


def test_a_match_ends_at_the_last_whole_page_that_agrees() -> None:
    tree = RadixTree(2)
    insert(tree, [1, 2, 3, 4, 5, 6], [10, 11, 12])
    assert found(tree, [1, 2, 3, 4, 5, 6, 7]) == [10, 11, 12]
    assert found(tree, [1, 2, 3, 9, 5, 6]) == [10]
    assert found(tree, [1, 9]) == []
    assert found(tree, [1]) == []


def test_what_the_tree_has_already_stays_with_the_caller() -> None:
    tree = RadixTree(1)
    insert(tree, [1, 2, 3], [10, 11, 12])
    node, known = tree.insert(tree.root, array([1, 2, 7]), [20, 21, 22], 0)
    assert known == 2
    assert node.pages == [22]
    assert found(tree, [1, 2, 7]) == [10, 11, 22]
    assert found(tree, [1, 2, 3]) == [10, 11, 12]
    tree.check()


def test_a_split_leaves_a_pinned_path_pinned_as_a_whole() -> None:
    tree = RadixTree(1)
    node = insert(tree, [1, 2, 3, 4], [10, 11, 12, 13])
    tree.pin(node)
    insert(tree, [1, 2, 9], [10, 11, 20])
    assert [page for part in tree.path(node) for page in reversed(part.pages)] == [13, 12, 11, 10]
    assert evicted(tree, 100) == [20]
    tree.unpin(node, 0)
    tree.check()
    assert tree.num_evictable == 4
    assert evicted(tree, 100) == [12, 13, 10, 11]


def test_eviction_takes_the_least_recently_used_leaf_from_its_tail() -> None:
    tree = RadixTree(1)
    insert(tree, [1, 1, 1], [10, 11, 12])
    second = insert(tree, [2, 2, 2], [20, 21, 22])
    insert(tree, [3, 3, 3], [30, 31, 32])
    tree.pin(second)
    tree.unpin(second, 0)
    first = insert(tree, [1, 1, 1], [0, 0, 0])
    tree.pin(first)
    tree.unpin(first, 0)
    assert evicted(tree, 2) == [31, 32]
    assert evicted(tree, 2) == [30, 22]
    assert found(tree, [2, 2, 2]) == [20, 21]
    tree.check()


def test_pages_of_the_step_being_built_are_pending_and_later_ones_are_not() -> None:
    tree = RadixTree(1)
    insert(tree, [1, 2], [10, 11], step=3)
    insert(tree, [1, 2, 3], [10, 11, 12], step=4)
    match = tree.match(tree.root, array([1, 2, 3]), 3, 4)
    assert (matched(tree, match), match.pending) == ([10, 11], True)
    match = tree.match(tree.root, array([1, 2, 3]), 3, 5)
    assert (matched(tree, match), match.pending) == ([10, 11, 12], False)


@given(
    st.sampled_from([1, 2, 3]),
    st.lists(st.tuples(SALTS, st.lists(st.integers(0, 2), max_size=9)), max_size=12),
    st.tuples(SALTS, st.lists(st.integers(0, 2), max_size=9)),
    st.integers(0, 20),
)
def test_matches_equal_those_of_a_table_of_all_prefixes(
    page_size: int,
    prompts: list[tuple[bytes, list[int]]],
    query: tuple[bytes, list[int]],
    num_evicted: int,
) -> None:
    tree, table, next_page = RadixTree(page_size), dict[tuple[bytes, tuple[int, ...]], int](), 0
    for salt, tokens in prompts:
        count = len(tokens) // page_size
        pages = list(range(next_page, next_page + count))
        next_page += count
        tree.insert(tree.root, array(tokens), pages, 0, salt)
        for i, page in enumerate(pages):
            table.setdefault((salt, tuple(tokens[: (i + 1) * page_size])), page)
        tree.check()
    gone = set(evicted(tree, num_evicted))
    tree.check()
    assert len(gone) == min(num_evicted, len(table))
    expected = []
    salt, tokens = query
    for end in range(page_size, len(tokens) + 1, page_size):
        page = table.get((salt, tuple(tokens[:end])))
        if page is None or page in gone:
            break
        expected.append(page)
    assert found(tree, tokens, salt=salt) == expected


def test_a_page_counts_in_a_pinned_match_from_its_first_pin_to_its_last() -> None:
    tree, tokens = RadixTree(1), array([1, 2, 3, 4])
    lower = insert(tree, [1, 2, 3], [10, 11, 12])
    upper = insert(tree, [1, 9], [10, 20]).parent
    assert upper is not None
    match, changes = Match(tree.root, 0, False), [tree.num_pin_changes]
    for pin, end in ((upper, 1), (lower, 3), (lower, 3)):
        tree.pin(pin)
        match = tree.match_pinned(match, tokens, 4, NOBODY)
        assert match.end == end
        changes.append(tree.num_pin_changes)
    for pin, end in ((lower, 3), (lower, 1), (upper, 0)):
        tree.unpin(pin, 0)
        match = tree.match_pinned(match, tokens, 4, NOBODY)
        assert match.end == end
        changes.append(tree.num_pin_changes)
    assert [b - a for a, b in itertools.pairwise(changes)] == [1, 1, 0, 0, 1, 1]
