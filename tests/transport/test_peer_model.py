"""Fetches from holders that fail in every way they can, against what must hold whatever happens.

A real core and a real Fetcher; the holders are made up: each has some blocks, and at each call
hangs for a moment, refuses, loses blocks between the lease and the read, damages them, breaks off,
or breaks off with writes that arrive later. Two requests of overlapping chains run at a time. After
every run:

  - a block that can be read holds exactly its bytes;
  - what a fetch answered is what is there;
  - no reservation and no claim is left, and every lease at a holder was released;
  - where no holder fails, all that any of them has is there;
  - slots that could still be written to were nobody else's until they could not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import kvstore
from kvstore import _native
from kvstore.block import BlockHashes
from kvstore.errors import DeadlineExceededError, PeerUnavailableError
from kvstore.peers import Fetcher, flight
from kvstore.peers.bandwidth import Bandwidth
from kvstore.peers.sources import Held, Read
from kvstore.peers.threads import Threads
from kvstore.tiers.fetching import Wanted
from kvstore.transport import Status

SPEC = kvstore.BlockSpec(1, 1, 32, 16, "float32")
NAMESPACE = kvstore.Namespace("model", SPEC)
SIZE = SPEC.block_bytes
SECONDS = 5.0
CHAIN = kvstore.hash_blocks(list(range(16 * 24)), 16)
OTHER = kvstore.hash_blocks([*range(16 * 10), *range(5000, 5000 + 16 * 8)], 16)
BYTES = {
    row.tobytes(): np.random.default_rng(i).integers(0, 256, SIZE, np.uint8)
    for i, row in enumerate(np.concatenate((CHAIN.array, OTHER.array)))
}
for _i in range(10):  # the chains begin alike
    BYTES[OTHER.array[_i].tobytes()] = BYTES[CHAIN.array[_i].tobytes()]


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """So that these short chains are divided among holders."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PIECE_BYTES_MIN", "PIECE_BYTES_FIRST", "PIECE_BYTES_MAX"):
            patch.setattr(flight, name, 3 * SIZE)
        yield


FAULTS = ("ok", "unreachable", "late", "short", "damaged", "lost", "refused", "unsettled")


@dataclass
class Memory:
    """What a link that broke does to where it was to write, until it is settled."""

    addresses: npt.NDArray[np.uint64]
    tries: int
    is_settled: bool = False

    def settle(self, timeout: float) -> bool:
        if self.is_settled:
            return True
        for address in self.addresses.tolist():
            write(address, np.full(SIZE, 0xEE, np.uint8))
        self.tries -= 1
        self.is_settled = self.tries < 0
        return self.is_settled


def write(address: int, data: npt.NDArray[np.uint8]) -> None:
    _native.move_pieces(
        np.array([address], np.uint64),
        np.array([data.ctypes.data], np.uint64),
        np.array([len(data)], np.uint64),
        None,
        1,
        SECONDS,
        None,
    )


@dataclass
class FakeHolder:
    """See `kvstore.peers.sources.Source`."""

    address: str
    has: int  # leading blocks of either chain
    faults: list[str]  # of the next calls, from the end; which call is next is a race of lanes
    read_faults: list[str] = field(default_factory=list)  # of reads only
    bytes_per_second: float = 0.0
    leases: set[int] = field(default_factory=set)
    reported: int = 0
    unsettled: list[Memory] = field(default_factory=list)
    threads: Threads = field(default_factory=lambda: Threads("fake", 4, 64))
    lock: threading.Lock = field(default_factory=threading.Lock)
    count: int = 0

    def fault(self) -> str:
        with self.lock:
            return self.faults.pop() if self.faults else "ok"

    def submit(self, step: Callable[[], None]) -> bool:
        return self.threads.submit(step)

    def _number_there(self, hashes: BlockHashes) -> int:
        return max(0, min(len(hashes), self.has - hashes.start))

    def _raise(self, fault: str) -> None:
        if fault == "unreachable":
            raise PeerUnavailableError(self.address)
        if fault == "late":
            raise DeadlineExceededError(self.address)

    def available(self, hashes: BlockHashes, seconds: float) -> int:
        self._raise(self.fault())
        return self._number_there(hashes)

    def acquire(self, hashes: BlockHashes, seconds: float) -> Held:
        fault = self.fault()
        self._raise(fault)
        there = self._number_there(hashes)
        if fault == "short":
            there //= 2
        if there == 0:
            return Held(0, np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        blocks = [BYTES[row.tobytes()] for row in hashes.array[:there]]
        with self.lock:
            self.count += 1
            self.leases.add(self.count)
            number = self.count
        offsets = np.array([block.ctypes.data for block in blocks], np.uint64)
        return Held(number, offsets, np.array([_native.xxh3(b) for b in blocks], np.uint64))

    def read(
        self,
        held: Held,
        places: npt.NDArray[np.uint64],
        addresses: npt.NDArray[np.uint64],
        seconds: float,
    ) -> Read:
        assert held.lease in self.leases, "a block is read without a lease"
        fault = self.read_faults.pop() if self.read_faults else self.fault()
        statuses = np.full(len(places), Status.OK, np.uint8)
        broken = {
            "damaged": Status.DAMAGED,
            "lost": Status.LOST,
            "refused": Status.REFUSED,
            "late": Status.LATE,
            "unreachable": Status.LOST,
            "unsettled": Status.LATE,
        }.get(fault)
        for i, (place, address) in enumerate(zip(places.tolist(), addresses.tolist(), strict=True)):
            is_bad = broken is not None and i % 2 == len(places) % 2
            if is_bad:
                assert broken is not None
                statuses[i] = int(broken)
                write(address, np.full(SIZE, 0xDD, np.uint8))
            else:
                source = np.array([held.offsets[place]], np.uint64)
                to = np.array([address], np.uint64)
                size = np.array([SIZE], np.uint64)
                _native.move_pieces(to, source, size, None, 1, SECONDS, None)
        if fault == "unsettled" and np.any(statuses != Status.OK):
            memory = Memory(addresses[statuses != Status.OK].copy(), self.count % 3)
            self.unsettled.append(memory)
            return Read(statuses, "ucx", memory)
        return Read(statuses, "tcp")

    def release(self, held: Held) -> None:
        with self.lock:
            self.leases.discard(held.lease)

    def report_damaged(self, block_hash: bytes) -> None:
        assert block_hash in BYTES
        self.reported += 1


class World:
    def __init__(self, holders: list[FakeHolder], slots: int) -> None:
        self.core = _native.StoreCore(slots * 4096, slots * 4096, False, "lru")
        self.number = self.core.add_namespace(SIZE)
        self.holders = {holder.address: holder for holder in holders}
        self.fetcher = Fetcher(self.core, lambda address, _: self.holders[address])

    def fetch(self, hashes: BlockHashes, timeout: float = SECONDS) -> int:
        wanted = Wanted(self.number, NAMESPACE, "", hashes)
        future = self.fetcher.fetch(wanted, list(self.holders), timeout)
        return future.result(timeout + SECONDS)

    def store(self, hashes: BlockHashes) -> None:
        owner = self.core.new_owner()
        reservation, _, offsets = self.core.reserve(
            owner, self.number, hashes.array, hashes.start, hashes.parent, False
        )
        blocks = [BYTES[row.tobytes()] for row in hashes.array[: np.count_nonzero(offsets)]]
        for offset, block in zip(offsets.tolist(), blocks, strict=False):
            self.core.arena[offset : offset + SIZE] = block
        if reservation:
            sums = np.array([_native.xxh3(block) for block in blocks], np.uint64)
            self.core.commit(owner, reservation, sums, None)

    def close(self) -> None:
        assert self.fetcher.close(SECONDS)
        for holder in self.holders.values():
            assert holder.threads.close(SECONDS)

    def check(self) -> None:
        """REQUIRES: it is closed."""
        assert self.fetcher.num_claimed == 0
        assert self.fetcher.quarantine.num_bytes == 0
        assert self.core.stats()["reservations"] == 0
        owner = self.core.new_owner()
        for hashes in (CHAIN, OTHER):
            lease, offsets, *_ = self.core.acquire(owner, self.number, hashes.array, None, False)
            for row, offset in zip(hashes.array, offsets.tolist(), strict=False):
                block = self.core.arena[offset : offset + SIZE]
                np.testing.assert_array_equal(block, BYTES[row.tobytes()])
            if lease:
                self.core.release(owner, lease)
        for holder in self.holders.values():
            assert not holder.leases, f"{holder.address} has leases of ours"
            assert all(memory.is_settled for memory in holder.unsettled)


def holders(*what: tuple[int, list[str]]) -> list[FakeHolder]:
    return [FakeHolder(f"tcp:h{i}:1", has, list(faults)) for i, (has, faults) in enumerate(what)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 24), st.lists(st.sampled_from(FAULTS), max_size=8)),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([9, 40]),
    st.integers(0, 12),
)
@example([(24, ["unsettled", "ok", "ok"]), (24, [])], 40, 0)
@example([(24, ["damaged", "ok", "ok"]), (12, ["lost", "ok", "ok"])], 40, 3)
def test_whatever_holders_do_nothing_wrong_is_read_and_nothing_leaks(
    what: list[tuple[int, list[str]]], slots: int, there: int
) -> None:
    world = World(holders(*what), slots)
    answers: dict[str, int] = {}
    try:
        world.store(CHAIN[:there])
        both = [
            threading.Thread(target=lambda: answers.__setitem__("chain", world.fetch(CHAIN, 2.0))),
            threading.Thread(target=lambda: answers.__setitem__("other", world.fetch(OTHER, 2.0))),
        ]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
    finally:
        world.close()
    world.check()
    assert set(answers) == {"chain", "other"}
    assert 0 <= answers["chain"] <= 24
    if slots > 34 and not any(faults for _, faults in what):
        most = max(has for has, _ in what)
        assert world.core.match(world.number, CHAIN.array, 0) == max(there, min(24, most))
        shared = min(10, there)
        assert world.core.match(world.number, OTHER.array, 0) == max(shared, min(18, most))


def test_a_piece_that_fails_comes_from_another_holder() -> None:
    for fault in ("damaged", "lost", "refused", "late", "unreachable", "unsettled", "short"):
        world = World(holders((24, [fault, "ok", "ok"]), (24, [])), 40)
        try:
            assert world.fetch(CHAIN) == 24, fault
        finally:
            world.close()
        world.check()


def test_damaged_blocks_are_reported_where_they_came_from() -> None:
    world = World(holders((24, [])), 40)
    world.holders["tcp:h0:1"].read_faults = ["damaged"]
    try:
        world.fetch(CHAIN)
    finally:
        world.close()
    world.check()
    assert world.holders["tcp:h0:1"].reported > 0
    assert world.fetcher.counts.snapshot()["kvstore_peer_failures_damaged_total"] > 0


def test_set_aside_slots_are_seen_and_come_back() -> None:
    world = World(holders((24, [])), 40)
    world.holders["tcp:h0:1"].read_faults = ["unsettled"]
    memory = threading.Event()
    holder = world.holders["tcp:h0:1"]
    real = holder.read

    class Slow(Memory):
        def settle(self, timeout: float) -> bool:
            return memory.is_set() and super().settle(timeout)

    def read(*arguments: object) -> Read:
        found = real(*arguments)  # type: ignore[arg-type]
        if found.unsettled is None:
            return found
        slow = Slow(holder.unsettled[-1].addresses, 0)
        holder.unsettled[-1] = slow
        return Read(found.statuses, found.mover, slow)

    holder.read = read  # type: ignore[method-assign,assignment]
    try:
        assert world.fetch(CHAIN, 1.0) < 24
        assert world.fetcher.quarantine.num_bytes > 0
        assert world.core.stats()["reservations"] > 0
        memory.set()
        end = time.monotonic() + SECONDS
        while world.fetcher.quarantine.num_bytes and time.monotonic() < end:
            time.sleep(0.005)
        assert world.fetcher.quarantine.num_bytes == 0
        assert world.fetch(CHAIN) == 24
    finally:
        memory.set()
        world.close()
    world.check()


def test_many_who_want_the_same_are_one_fetch() -> None:
    world = World(holders((24, [])), 40)
    holder = world.holders["tcp:h0:1"]
    gate = threading.Event()
    real = holder.acquire

    def acquire(hashes: BlockHashes, seconds: float) -> Held:
        gate.wait(SECONDS)
        return real(hashes, seconds)

    holder.acquire = acquire  # type: ignore[method-assign]
    wanted = Wanted(world.number, NAMESPACE, "", CHAIN)
    try:
        futures = [world.fetcher.fetch(wanted, list(world.holders), SECONDS) for _ in range(50)]
        end = time.monotonic() + SECONDS
        counts = world.fetcher.counts.snapshot
        while counts()["kvstore_peer_fetches_joined_total"] < 49 and time.monotonic() < end:
            time.sleep(0.002)
        gate.set()
        assert [future.result(SECONDS) for future in futures] == [24] * 50
        assert counts()["kvstore_peer_fetched_tcp_blocks_total"] == 24
    finally:
        gate.set()
        world.close()
    world.check()


def test_a_bandwidth_bounds_what_is_fetched() -> None:
    now = [0.0]
    bucket = Bandwidth(1000, lambda: now[0])
    assert bucket.take(500, 1.0) == 0.0  # a burst
    assert bucket.take(500, 0.1) is None, "it would come too late"
    wait = bucket.take(500, 1.0)
    assert wait is not None
    assert abs(wait - 0.4) < 1e-9
    now[0] = 10.0
    granted = 0
    while now[0] < 20.0:
        granted += 700
        now[0] += bucket.take(700, 60.0) or 0.0
        if now[0] == 10.0 and granted > 5000:
            raise AssertionError("no bound")
    assert granted <= 10 * 1000 + 2 * 700 + 100


def test_a_fetch_that_is_closed_ends_soon() -> None:
    world = World(holders((24, [])), 40)
    holder = world.holders["tcp:h0:1"]
    entered = threading.Event()
    stop = threading.Event()

    def available(hashes: BlockHashes, seconds: float) -> int:
        entered.set()
        stop.wait(SECONDS)
        raise DeadlineExceededError("hangs")

    holder.available = available  # type: ignore[method-assign]
    future = world.fetcher.fetch(
        Wanted(world.number, NAMESPACE, "", CHAIN), list(world.holders), 60.0
    )
    assert entered.wait(SECONDS)
    threading.Timer(0.05, stop.set).start()
    world.close()
    assert future.result(SECONDS) == 0
    world.check()
