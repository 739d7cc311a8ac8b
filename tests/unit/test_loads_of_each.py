"""Loads of blocks by themselves where the store does not stand still.

A control that wraps a real one changes things between the look and the acquire, or takes few blocks
at once. Proved: what is lost meanwhile takes nothing else along, pieces are kept to, round trips
stay few, and no request begins after the deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvstore import BlockHashes, ContiguousBlocks, Store
from kvstore.control import Granted
from tests.store_support import BLOCK_BYTES, assert_exact, bytes_of, chain, open_store, put


class Meddler:
    """A store's control; `before_acquire` runs before each acquire."""

    def __init__(self, inner: Any, piece: int | None = None) -> None:
        self._inner = inner
        self.piece_blocks = piece
        self.before_acquire: Callable[[], None] = lambda: None
        self.acquired: list[int] = []  # how many blocks each acquire asked for
        self.looks = 0

    # Not `put` and `load`, which a store takes for short cuts.
    def __getattr__(self, name: str) -> Any:
        if name in ("put", "load"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def residency(self, hashes: BlockHashes) -> Any:
        self.looks += 1
        return self._inner.residency(hashes)

    def acquire(self, hashes: BlockHashes, ttl: float | None, timeout: float) -> Granted:
        self.acquired.append(len(hashes))
        self.before_acquire()
        granted: Granted = self._inner.acquire(hashes, ttl, timeout)
        return granted


@pytest.fixture
def store() -> Iterator[Store]:
    with open_store() as opened:
        yield opened


def meddled(store: Store, call_seconds: float = 60.0, piece: int | None = None) -> Meddler:
    control = Meddler(store.control, piece)
    store._control = control
    store._fast_load = store._fast_put = None
    store._call_seconds = call_seconds
    return control


def alone(seed: int, count: int) -> BlockHashes:
    return BlockHashes.of(chain(seed, count).array)


def load_each(store: Store, hashes: BlockHashes) -> list[int]:
    room = np.zeros((len(hashes), BLOCK_BYTES), np.uint8)
    arrived = np.flatnonzero(store.load_each(hashes, ContiguousBlocks(room), timeout=1.0))
    for i in arrived:
        assert np.array_equal(room[i], bytes_of(hashes[int(i)]))
    return [int(i) for i in arrived]


def test_what_is_there_takes_one_look_and_one_acquire(store: Store) -> None:
    hashes = alone(1, 9)
    put(store, hashes[3:6])
    put(store, hashes[8:])
    control = meddled(store)
    assert load_each(store, hashes) == [3, 4, 5, 8]
    assert (control.looks, control.acquired) == (1, [9])


def test_a_block_that_goes_before_it_is_acquired_takes_no_other_along(store: Store) -> None:
    hashes = alone(1, 6)
    put(store, hashes)
    control = meddled(store)

    def lose_one() -> None:
        store.remove(hashes[2:3])

    control.before_acquire = lose_one
    assert load_each(store, hashes) == [0, 1, 3, 4, 5]
    assert control.acquired == [6, 3]


def test_pieces_are_no_larger_than_the_control_takes(store: Store) -> None:
    hashes = alone(1, 7)
    put(store, hashes)
    control = meddled(store, piece=3)
    assert load_each(store, hashes) == list(range(7))
    assert control.acquired == [3, 3, 1]
    room = np.zeros((7, BLOCK_BYTES), np.uint8)
    assert store.load(hashes, ContiguousBlocks(room)).wait().num_blocks == 7
    assert_exact(hashes, room, 7)


def test_blocks_that_cannot_be_had_end_it(store: Store) -> None:
    hashes = alone(1, 6)
    put(store, hashes)
    control = meddled(store)
    nothing = store.control.acquire(hashes[:0], 1.0, 0.0)
    control.acquire = lambda *_: nothing  # type: ignore[method-assign]
    assert load_each(store, hashes) == []
    assert control.looks <= 3


def test_after_the_deadline_no_request_begins(store: Store) -> None:
    hashes = alone(1, 6)
    put(store, hashes)
    control = meddled(store, call_seconds=0.0, piece=1)
    room = ContiguousBlocks(np.zeros((6, BLOCK_BYTES), np.uint8))
    assert store.load_each(hashes, room, timeout=0.0).tolist() == [True] + [False] * 5
    assert control.acquired == [1]
