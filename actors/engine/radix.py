"""Radix tree over token ids: which prefixes have their KV in the pool. Pure, no torch.

    namespace -> root -> node(key tokens, slots) -> ...

Each node holds the KV slots of its key. A lock on a node protects it and all its ancestors from eviction; everything
unlocked can be evicted, least recently used leaves first. Namespaces (SGLang's `extra_key` / `cache_salt`) never share.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

import numpy as np

from opd_async.actors.engine.slots import IntArray

_EMPTY: IntArray = np.empty(0, dtype=np.int32)


class Node:
    """A run of tokens that all its descendants share. `parent` is None for a namespace's root and for evicted nodes."""

    __slots__ = ("children", "key", "locks", "namespace", "parent", "queued", "slots", "stamp")

    def __init__(self, key: list[int], slots: IntArray, parent: Node | None, namespace: str) -> None:
        self.key = key
        self.slots = slots
        self.parent = parent
        self.namespace = namespace
        self.children: dict[int, Node] = {}
        self.locks = 0
        self.stamp = 0
        self.queued = False

    @property
    def evictable(self) -> bool:
        """A leaf that nobody holds."""
        return self.locks == 0 and not self.children and self.parent is not None


class RadixCache:
    """Longest-prefix cache of KV slots. Token counts are exact: page size 1."""

    def __init__(self) -> None:
        self._roots: dict[str, Node] = {}
        self._heap: list[tuple[int, int, Node]] = []
        self._clock = itertools.count(1)
        self._serial = itertools.count()
        self.evictable_tokens = 0
        self.locked_tokens = 0

    def match(self, namespace: str, tokens: list[int], limit: int) -> tuple[Node, IntArray]:
        """Longest cached prefix of `tokens[:limit]`: its last node (to lock) and its slots, int32 [matched]."""
        root = self._root(namespace)
        node, matched, parts = root, 0, []
        stamp = next(self._clock)
        while matched < limit:
            child = node.children.get(tokens[matched])
            if child is None:
                break
            # Only the last node on the path can match in part; it is split so that its head can be locked alone.
            common = _common(child.key, tokens, matched, limit)
            if common < len(child.key):
                child = self._split(child, common)
            child.stamp = stamp
            parts.append(child.slots)
            matched += common
            node = child
        if not parts:
            return root, _EMPTY
        return node, parts[0] if len(parts) == 1 else np.concatenate(parts)

    def insert(self, namespace: str, tokens: list[int], slots: IntArray) -> tuple[Node, int]:
        """Cache `tokens` under `slots`, int32 [len(tokens)].

        Returns the node that ends at the last token, and how many tokens the tree already held: for those it keeps its
        own slots, and the caller must return its duplicates to the pool.
        """
        node, held = self.match(namespace, tokens, len(tokens))
        present = len(held)
        if present == len(tokens):
            return node, present
        # A copy: the caller's row is overwritten by the next request that gets it.
        leaf = Node(tokens[present:], slots[present:].copy(), node, namespace)
        leaf.stamp = next(self._clock)
        node.children[tokens[present]] = leaf
        self.evictable_tokens += len(leaf.key)
        self._enqueue(leaf)
        return leaf, present

    def lock(self, node: Node) -> None:
        """Protect `node` and its ancestors until the matching unlock."""
        # Roots are locked too, so that a namespace in use is not forgotten.
        here: Node | None = node
        while here is not None:
            if here.locks == 0:
                self.evictable_tokens -= len(here.key)
                self.locked_tokens += len(here.key)
            here.locks += 1
            here = here.parent

    def unlock(self, node: Node) -> None:
        """Undo one lock. Raises ValueError when the node is not locked."""
        here: Node | None = node
        while here is not None:
            if here.locks == 0:
                raise ValueError("unlock of a radix node that is not locked")
            here.locks -= 1
            if here.locks == 0:
                self.evictable_tokens += len(here.key)
                self.locked_tokens -= len(here.key)
                self._enqueue(here)
                self._forget_empty_root(here)
            here = here.parent

    def evict(self, count: int) -> IntArray:
        """Drop least recently used leaves until at least `count` tokens are gone or none is left; their slots."""
        gone: list[IntArray] = []
        total = 0
        while total < count and self._heap:
            stamp, _, node = heapq.heappop(self._heap)
            node.queued = False
            if not node.evictable:
                continue
            # It was used since it was queued: back in line under its new stamp.
            if stamp != node.stamp:
                self._enqueue(node)
                continue
            gone.append(node.slots)
            total += len(node.key)
            self._remove(node)
        return np.concatenate(gone) if gone else _EMPTY

    def clear(self) -> IntArray:
        """Drop everything that is not locked; the slots that became free."""
        return self.evict(self.evictable_tokens)

    def nodes(self) -> Iterator[Node]:
        """All nodes but the roots, for checks and introspection."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None:
                yield node

    def _root(self, namespace: str) -> Node:
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node([], _EMPTY, None, namespace)
        return root

    def _split(self, node: Node, at: int) -> Node:
        """Cut `node` in two; the new upper half carries the same locks and is returned."""
        upper = Node(node.key[:at], node.slots[:at], node.parent, node.namespace)
        upper.locks, upper.stamp = node.locks, node.stamp
        upper.children = {node.key[at]: node}
        if node.parent is not None:
            node.parent.children[node.key[0]] = upper
        node.key, node.slots, node.parent = node.key[at:], node.slots[at:], upper
        return upper

    def _enqueue(self, node: Node) -> None:
        # One heap entry per node at most; a stale stamp is put right when the entry is popped.
        if node.evictable and not node.queued:
            node.queued = True
            heapq.heappush(self._heap, (node.stamp, next(self._serial), node))

    def _remove(self, node: Node) -> None:
        parent = node.parent
        if parent is None:
            return
        del parent.children[node.key[0]]
        node.parent = None
        self.evictable_tokens -= len(node.key)
        self._enqueue(parent)
        self._forget_empty_root(parent)

    def _forget_empty_root(self, node: Node) -> None:
        # A namespace per weight version would otherwise leave one root behind for each update.
        if node.parent is None and not node.children and node.locks == 0:
            self._roots.pop(node.namespace, None)


def _common(key: list[int], tokens: list[int], start: int, limit: int) -> int:
    """How many tokens of `key` agree with tokens[start:limit]; list slices compare at C speed."""
    length = min(len(key), limit - start)
    if key[:length] == tokens[start : start + length]:
        return length
    for index in range(length):
        if key[index] != tokens[start + index]:
            return index
    return length
