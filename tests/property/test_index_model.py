"""The bare index against a set of paths: a chain is a path from the root of a tree.

After each step every chain, whole and from its middle, with and without lineage, matches exactly
the leading run of blocks that the set holds.
"""

import hashlib

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore import _native

Path = tuple[int, ...]
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
NAMESPACES = st.integers(0, 1)


def hashes_of(paths: list[Path]) -> npt.NDArray[np.uint8]:
    raw = b"".join(hashlib.sha256(bytes(path)).digest() for path in paths)
    return np.frombuffer(raw, np.uint8).reshape(-1, 32)


def prefixes(path: Path) -> list[Path]:
    return [path[: i + 1] for i in range(len(path))]


class IndexModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = _native.BlockIndex()
        self.held: set[tuple[int, Path]] = set()
        self.asked: set[Path] = set()

    @rule(namespace=NAMESPACES, path=PATHS)
    def insert(self, namespace: int, path: Path) -> None:
        self.index.insert_chain(namespace, hashes_of(prefixes(path)))
        self.held |= {(namespace, prefix) for prefix in prefixes(path)}
        self.asked.add(path)

    @rule(namespace=NAMESPACES, path=PATHS)
    def remove_leaf(self, namespace: int, path: Path) -> None:
        has_child = any((namespace, (*path, step)) in self.held for step in range(16))
        expected = (namespace, path) in self.held and not has_child
        raw = hashes_of([path]).tobytes()
        assert self.index.remove_leaf(namespace, raw) == expected
        self.held.discard((namespace, path) if expected else (-1, ()))
        self.asked.add(path)

    @rule(namespace=NAMESPACES, first=st.integers(0, 2))
    def insert_many(self, namespace: int, first: int) -> None:
        # More than a table holds before it grows.
        paths = [(first, 9, i // 16, i % 16) for i in range(256)]
        for path in paths:
            self.index.insert_chain(namespace, hashes_of(prefixes(path)))
            self.held |= {(namespace, prefix) for prefix in prefixes(path)}
        self.asked.add(paths[77])

    @invariant()
    def matches_are_leading_runs(self) -> None:
        assert len(self.index) == len(self.held)
        for path in list(self.asked)[:30]:
            for namespace in (0, 1):
                chain = prefixes((*path, 0, 1))
                hashes = hashes_of(chain)
                held = [(namespace, prefix) in self.held for prefix in chain]
                for start in (0, len(path) // 2):
                    run = [*held[start:], False].index(False)
                    assert self.index.match(namespace, hashes[start:], start) == run
                    assert self.index.match(namespace, hashes[start:], -1) == run
                assert self.index.count(namespace, hashes) == sum(held)


IndexModel.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestIndexModel = IndexModel.TestCase
