"""The picture of the tree: whole if it fits, otherwise the most used nodes with their ancestors."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from minisrv.kvcache.manager import KVCacheManager, Lease
from minisrv.kvcache.tree_view import view_tree

PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


def served(cache: KVCacheManager, prompt: list[int], uid: int) -> Lease:
    """A lease whose whole prompt is computed."""
    ids = np.array(prompt, np.int32)
    lease = cache.open_lease(uid=uid)
    computed = cache.extend_match(lease, ids, 0, -1)
    assert computed is not None
    cache.grow(lease, len(ids))
    cache.share(lease, ids, len(ids), 0)
    return lease


@example([[0], [0], [2, 2], [2, 1, 2, 0, 1, 0], [1, 0, 2, 2, 0], [0], [2, 1], [1], [0]], 3, 8)
@given(st.lists(PROMPTS, max_size=12), st.integers(1, 20), st.integers(0, 11))
def test_the_most_used_nodes_are_shown_with_their_ancestors(
    prompts: list[list[int]], max_nodes: int, num_closed: int
) -> None:
    cache = KVCacheManager(100, 20, 1, radix_cache=True)
    leases = [served(cache, prompt, uid) for uid, prompt in enumerate(prompts)]
    for prompt, lease in list(zip(prompts, leases, strict=True))[:num_closed]:
        cache.close_lease(lease, np.array(prompt, np.int32), len(prompt))
    cache.check(leases[num_closed:])
    ends = [cache.recent[0].node] if prompts else []
    everything = set(cache.tree.nodes())
    shown = view_tree(cache.tree, max_nodes, ends)
    assert len(set(shown.nodes)) == len(shown.nodes) <= max_nodes
    known = {cache.tree.root, *shown.nodes}
    assert all(node.parent in known for node in shown.nodes)
    if prompts:
        by_id = {node.id: node for node in everything}
        tokens = [token for id in shown.path for token in by_id[id].tokens.tolist()]
        assert tokens == prompts[0][: len(tokens)]
        assert len(tokens) >= len(prompts[0]) - 1
    # One of the most used of those left out would not have fitted.
    if left := everything - set(shown.nodes):
        most = max((node.refs, node.last_used) for node in left)
        first = [node for node in left if (node.refs, node.last_used) == most]
        missing = [[n for n in cache.tree.path(node) if n not in known] for node in first]
        assert len(shown.nodes) + max(map(len, missing)) > max_nodes


def test_a_closed_lease_is_found_until_many_others_came_and_without_its_evicted_end() -> None:
    cache = KVCacheManager(100, 20, 1, radix_cache=True)
    for uid, prompt in enumerate(([1, 2, 3], [1, 2, 4])):
        ids = np.array(prompt, np.int32)
        cache.close_lease(served(cache, prompt, uid), ids, 3)
    nodes = {node.id: node.tokens.tolist() for node in cache.tree.nodes()}
    path = view_tree(cache.tree, 10, [cache.recent[0].node]).path
    assert [nodes[id] for id in path] == [[1, 2], [3]]
    cache.evict(1)
    assert view_tree(cache.tree, 10, [cache.recent[0].node]).path == path[:1]
