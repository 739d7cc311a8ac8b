"""Pins keep what a lookup promised until it is loaded, end by themselves when nobody loads it, and
never hold up the scheduler: with an embedded store that answers when the test says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

import kvstore
from kvstore import BlockHashes, KVStoreError, Store
from kvstore_adapters.sglang import pins as pins_module
from kvstore_adapters.sglang.pins import Pins
from tests.store_support import SLOTS, WAIT_S, chain, load, open_store, put

POOL = "kv"


class Source:
    """A store whose acquire waits for `gate`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.gate = threading.Event()
        self.gate.set()
        self.num_asked = 0
        self.error: KVStoreError | None = None

    @property
    def store(self) -> Any:
        return self

    def hashes(self, keys: Sequence[str]) -> BlockHashes:
        return BlockHashes.of([bytes.fromhex(key) for key in keys])

    def acquire(self, hashes: BlockHashes, *, ttl: float, timeout: float) -> kvstore.Lease:
        self.num_asked += 1
        assert self.gate.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        return self._store.acquire(hashes, ttl=ttl, timeout=timeout)


@pytest.fixture
def store() -> Iterator[Store]:
    with open_store() as opened:
        yield opened


@pytest.fixture
def source(store: Store) -> Source:
    return Source(store)


@pytest.fixture
def found() -> list[tuple[str, int]]:
    return []


@pytest.fixture
def pins(source: Source, found: list[tuple[str, int]]) -> Iterator[Pins]:
    made = Pins(
        {POOL: source},
        lease_seconds=WAIT_S,
        acquire_seconds=WAIT_S,
        idle_seconds=0.01,
        found=lambda name, keys, count: found.append((name, count)),
        idle=lambda: None,
    )
    yield made
    source.gate.set()
    made.close(WAIT_S)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.001)


def num_free(store: Store) -> int:
    """How many blocks of a new chain fit beside those that are pinned."""
    return put(store, chain(time.monotonic_ns() % 1000 + 1000, SLOTS)).num_stored


def test_pinned_pages_survive_a_full_store_until_they_are_released(
    store: Store, pins: Pins, found: list[tuple[str, int]]
) -> None:
    hashes = chain(1, 4)
    put(store, hashes)
    wants = {POOL: hashes.hex() + chain(2, 1).hex()}
    pin = pins.begin("request", wants, wants)
    assert pin is not None
    assert pins.wait(pin, WAIT_S)
    assert found == [(POOL, 4)]
    assert not pin.holds(wants)
    assert pin.holds({POOL: hashes.hex()})
    assert num_free(store) == SLOTS - 4
    assert load(store, hashes) == 4
    taken = pins.take("request")
    assert taken is pin
    pins.release(pin)
    wait_until(lambda: pin.pages[POOL].num_pages == 0)
    assert num_free(store) == SLOTS


def test_nobody_waits_for_a_store_that_keeps_another_question_waiting(
    source: Source, pins: Pins
) -> None:
    source.gate.clear()
    first = pins.begin("first", {POOL: chain(1, 1).hex()}, {})
    assert first is not None
    wait_until(lambda: source.num_asked == 1)
    assert not pins.wait(first, 0.001)
    second = pins.begin("second", {POOL: chain(2, 1).hex()}, {})
    assert second is not None
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - pins._busy_since > 0.001)
    assert not pins.wait(second, 0.001)
    assert time.monotonic() - began < WAIT_S
    source.gate.set()
    assert second.wait(WAIT_S)


def test_questions_beyond_the_bound_are_not_asked(source: Source, pins: Pins) -> None:
    source.gate.clear()
    wants = {POOL: chain(1, 1).hex()}
    begun = [pins.begin(str(i), wants, {}) for i in range(pins_module.MAX_QUEUED + 5)]
    # One may have been taken from the queue already.
    assert 4 <= sum(pin is None for pin in begun) <= 5
    source.gate.set()
    assert all(pin.wait(WAIT_S) for pin in begun if pin is not None)


def test_the_same_question_is_asked_once_while_its_answer_is_fresh(
    store: Store, source: Source, pins: Pins
) -> None:
    hashes = chain(1, 3)
    put(store, hashes)
    whole, part = {POOL: hashes.hex()}, {POOL: hashes[:2].hex()}
    pin = pins.begin("request", whole, whole)
    assert pin is not None
    assert pins.wait(pin, WAIT_S)
    asked = source.num_asked
    assert pins.begin("request", part, part) is pin
    assert pins.begin("request", whole, part) is pin
    assert source.num_asked == asked
    other = pins.begin("request", {POOL: chain(2, 1).hex()}, {})
    assert other is not None
    assert other is not pin
    assert pins.wait(other, WAIT_S)
    wait_until(lambda: pin.pages[POOL].num_pages == 0)
    put(store, chain(2, 1))
    again = pins.begin("request", {POOL: chain(2, 1).hex()}, {POOL: chain(2, 1).hex()})
    assert again is not None
    assert pins.wait(again, WAIT_S)
    assert again.pages[POOL].num_pages == 1


def test_an_error_of_the_store_pins_nothing_and_ends_nothing(
    store: Store, source: Source, pins: Pins
) -> None:
    hashes = chain(1, 2)
    put(store, hashes)
    source.error = kvstore.StoreClosedError("the store is closed")
    pin = pins.begin("request", {POOL: hashes.hex()}, {POOL: hashes.hex()})
    assert pin is not None
    assert pin.wait(WAIT_S)
    assert pin.pages[POOL].num_pages == 0
    source.error = None
    later = pins.begin("request", {POOL: hashes.hex()}, {POOL: hashes.hex()})
    assert later is not None
    assert later.wait(WAIT_S)
    assert later.pages[POOL].num_pages == 2


def test_closing_ends_all_leases_and_answers_all_questions(store: Store, source: Source) -> None:
    hashes = chain(1, 3)
    put(store, hashes)
    pins = Pins(
        {POOL: source},
        lease_seconds=WAIT_S,
        acquire_seconds=WAIT_S,
        idle_seconds=WAIT_S,
        found=lambda *_: None,
        idle=lambda: None,
    )
    begun = [pins.begin(str(i), {POOL: hashes.hex()}, {POOL: hashes.hex()}) for i in range(20)]
    pins.close(WAIT_S)
    assert all(pin is not None and pin.is_done for pin in begun)
    assert num_free(store) == SLOTS
