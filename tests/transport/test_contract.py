"""The contract of every mover: a peer in a process of its own, exact bytes or an honest status.

Each test runs over each mover that works here; a peer is killed, frozen, replaced, and lies about
its memory. Local memory of a piece that is not OK is never looked at.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import IncompatibleError, KVStoreError, PeerUnavailableError, StoreClosedError, _native
from kvstore.transport import Batch, Endpoint, Link, Status, TransportSettings
from tests.transport.peer import Peer, pattern

SIZE = 1 << 20
TIMEOUT = float(os.environ.get("TRANSPORT_TEST_TIMEOUT", "2"))
# For a loaded machine; nothing here may hang. An emulated one needs more.
SLACK = float(os.environ.get("TRANSPORT_TEST_SLACK", "3"))
OK, DAMAGED, REFUSED = Status.OK, Status.DAMAGED, Status.REFUSED
MOVERS = ["shm", "tcp", "ucx"]


@dataclass
class Pair:
    """Our endpoint, a peer's, and the mover between them."""

    ours: Endpoint
    peer: Peer
    mover: str

    def link(self) -> Link:
        link = self.ours.connect(self.peer.info(), movers=(self.mover,), timeout=TIMEOUT)
        assert link.mover == self.mover
        return link


def _settings(mover: str) -> TransportSettings:
    """By default what works on any machine; tests/rdma names devices."""
    return TransportSettings(
        movers=(mover,),
        timeout=TIMEOUT,
        ucx_tls=os.environ.get("TRANSPORT_TEST_UCX_TLS", ""),
        ucx_devices=os.environ.get("TRANSPORT_TEST_UCX_DEVICES", ""),
    )


def _pair(mover: str) -> Pair:
    wanted = _settings(mover)
    try:
        ours = Endpoint(wanted)
    except (KVStoreError, ModuleNotFoundError) as error:
        pytest.skip(f"{mover}: {error}")
    return Pair(ours, Peer(wanted), mover)


@pytest.fixture(scope="module", params=MOVERS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A peer that no test harms."""
    made = _pair(request.param)
    yield made
    assert made.peer.is_running(), "it died of what was asked of it"
    made.peer.close()
    made.ours.close()


@pytest.fixture(params=MOVERS)
def mortal(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A peer of the test's own."""
    made = _pair(request.param)
    yield made
    made.peer.close()
    made.ours.close()


def addresses(array: npt.NDArray[np.uint8], offsets: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    return np.asarray(offsets, np.uint64) + np.uint64(array.ctypes.data)


def sums(data: npt.NDArray[np.uint8], offsets: list[int], lengths: list[int]) -> list[int]:
    return [_native.xxh3(data[at : at + size]) for at, size in zip(offsets, lengths, strict=True)]


def test_reads_bring_exact_bytes_of_any_size_from_anywhere(pair: Pair) -> None:
    region = pair.peer.register(SIZE, seed=1)
    there, here = pattern(1, SIZE), np.zeros(SIZE, np.uint8)
    lengths = [1, 63, 64, 240, 241, 4096, 65536, 262144, 300001, 0, 7]
    offsets = [SIZE - 1, 5, 999, 0, 1, 4095, 65535, 131072, 640000, SIZE, 12]
    places = np.cumsum([0, *lengths[:-1]])
    with pair.link() as link:
        for checksums in (None, sums(there, offsets, lengths)):
            here[:] = 0
            batch = Batch(addresses(here, places), offsets, lengths, checksums)
            assert link.read(region.region_id, batch).tolist() == [OK] * len(lengths)
            for place, offset, size in zip(places, offsets, lengths, strict=True):
                assert (here[place : place + size] == there[offset : offset + size]).all()
        assert here[int(places[-1]) + 7 :].max(initial=0) == 0
        assert len(link.read(region.region_id, Batch([], [], []))) == 0


def test_writes_arrive_exactly_where_they_should(pair: Pair) -> None:
    region = pair.peer.register(SIZE, writable=True, seed=2)
    there, here = pattern(2, SIZE), pattern(3, SIZE)
    lengths, offsets = [100, 70000, 262144, 1], [3, 5000, 400000, SIZE - 1]
    batch = Batch(addresses(here, offsets), offsets, lengths, sums(here, offsets, lengths))
    with pair.link() as link:
        assert link.write(region.region_id, batch).tolist() == [OK] * 4
    for offset, size in zip(offsets, lengths, strict=True):
        there[offset : offset + size] = here[offset : offset + size]
    assert pair.peer.contents(region.region_id) == _native.xxh3(there)


def test_what_does_not_lie_in_a_region_is_refused_and_nothing_else(pair: Pair) -> None:
    region = pair.peer.register(SIZE, seed=4)
    there, here = pattern(4, SIZE), np.zeros(SIZE, np.uint8)
    offsets = [0, SIZE, SIZE - 9, 2**64 - 4, 2**63, 64]
    lengths = [64, 1, 10, 8, 2**63, 2**64 - 1]
    wanted = [OK, REFUSED, REFUSED, REFUSED, REFUSED, REFUSED]
    with pair.link() as link:
        batch = Batch(addresses(here, [0] * 6), offsets, lengths)
        assert link.read(region.region_id, batch).tolist() == wanted
        assert (here[:64] == there[:64]).all()
        one = Batch(addresses(here, [0]), [0], 64)
        assert link.read(region.region_id + 77, one).tolist() == [REFUSED]
        assert link.write(region.region_id, one).tolist() == [REFUSED], "it is not writable"
        assert link.read(region.region_id, one).tolist() == [OK], "the link goes on"
    assert pair.peer.contents(region.region_id) == _native.xxh3(there)


def test_bytes_that_fail_their_checksum_are_never_called_whole(pair: Pair) -> None:
    region = pair.peer.register(SIZE, seed=5)
    there, here = pattern(5, SIZE), np.zeros(SIZE, np.uint8)
    offsets, lengths = [0, 100, 70000, 200000], [100, 300, 65536, 262144]
    checksums = sums(there, offsets, lengths)
    checksums[0] ^= 1
    checksums[2] ^= 1 << 63
    with pair.link() as link:
        batch = Batch(addresses(here, offsets), offsets, lengths, checksums)
        statuses = link.read(region.region_id, batch).tolist()
    assert statuses == [DAMAGED, OK, DAMAGED, OK]


def test_many_pieces_in_one_batch(pair: Pair) -> None:
    region = pair.peer.register(SIZE, seed=6)
    there, here = pattern(6, SIZE), np.zeros(SIZE, np.uint8)
    order = np.random.default_rng(6).permutation(4096) * 256
    with pair.link() as link:
        batch = Batch(addresses(here, order), order, 256)
        assert not link.read(region.region_id, batch).any()
    assert (here == there).all()


def test_threads_share_a_link(pair: Pair) -> None:
    region = pair.peer.register(SIZE, writable=True, seed=7)
    there = pattern(7, SIZE)
    wrong: list[str] = []

    def work(first: int) -> None:
        here = np.zeros(1 << 16, np.uint8)
        for turn in range(8):
            at = first + (turn % 4 << 16)
            batch = Batch(addresses(here, [0]), [at], 1 << 16)
            if link.read(region.region_id, batch).any() or (here != there[at:][: 1 << 16]).any():
                wrong.append(f"read at {at}")
            if link.write(region.region_id, batch).any():
                wrong.append(f"write at {at}")

    with pair.link() as link:
        threads = [threading.Thread(target=work, args=[i << 18]) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert pair.peer.contents(region.region_id) == _native.xxh3(there)


def test_regions_come_and_go_while_a_link_is_open(pair: Pair) -> None:
    first = pair.peer.register(SIZE, seed=8)
    here = np.zeros(SIZE, np.uint8)
    batch = Batch(addresses(here, [0]), [0], SIZE)
    with pair.link() as link:
        second = pair.peer.register(SIZE, seed=9)
        link.add_region(second)
        assert link.read(second.region_id, batch).tolist() == [OK]
        assert (here == pattern(9, SIZE)).all()
        pair.peer.deregister(first.region_id)
        # A mover that cannot tell may still read it: then it is the bytes that were there.
        here[:] = 0
        (status,) = link.read(first.region_id, batch)
        assert status != OK or (here == pattern(8, SIZE)).all()
        assert link.read(second.region_id, batch).tolist() == [OK]
    assert pair.peer.is_running()


def test_a_region_that_peers_may_write_is_not_free_before_they_are_gone(mortal: Pair) -> None:
    region = mortal.peer.register(SIZE, writable=True, seed=10)
    link = mortal.link()
    free_at_once = mortal.peer.deregister(region.region_id)
    if free_at_once:  # then nothing of ours may get there any more
        batch = Batch(addresses(np.ones(64, np.uint8), [0]), [0], 64)
        assert link.write(region.region_id, batch)[0] != OK
    assert link.close(TIMEOUT)
    assert mortal.peer.deregister(region.region_id) or mortal.mover == "ucx"
    assert mortal.peer.contents(region.region_id) == _native.xxh3(pattern(10, SIZE))


def test_a_killed_peer_is_noticed_and_costs_no_time(mortal: Pair) -> None:
    region = mortal.peer.register(SIZE, seed=11)
    here = np.zeros(SIZE, np.uint8)
    batch = Batch(addresses(here, [0]), [0], SIZE)
    link = mortal.link()
    assert link.read(region.region_id, batch).tolist() == [OK]
    mortal.peer.kill()
    began = time.monotonic()
    assert link.read(region.region_id, batch)[0] in (Status.LOST, Status.LATE)
    assert time.monotonic() - began < TIMEOUT + SLACK
    assert not link.is_alive
    assert link.read(region.region_id, batch)[0] != OK
    assert link.close(TIMEOUT + SLACK), "nothing can write here any more"


def test_a_peer_killed_in_mid_move_loses_pieces_never_bytes(mortal: Pair) -> None:
    region = mortal.peer.register(32 << 20, seed=12)
    there, here = pattern(12, 32 << 20), np.zeros(32 << 20, np.uint8)
    offsets = [i << 18 for i in range(128)]
    batch = Batch(addresses(here, offsets), offsets, 1 << 18)
    link = mortal.link()
    killer = threading.Timer(0.02, mortal.peer.kill)
    killer.start()
    began = time.monotonic()
    while True:
        here[:] = 0
        statuses = link.read(region.region_id, batch, timeout=TIMEOUT)
        good = [i for i, status in enumerate(statuses) if status == OK]
        for i in good:
            assert (here[i << 18 : (i + 1) << 18] == there[i << 18 : (i + 1) << 18]).all()
        if len(good) < len(offsets):
            break
    killer.join()
    assert time.monotonic() - began < 2 * (TIMEOUT + SLACK)
    link.close(TIMEOUT)


def test_a_frozen_peer_costs_one_deadline(mortal: Pair) -> None:
    region = mortal.peer.register(8 << 20, seed=13)
    here = np.zeros(8 << 20, np.uint8)
    batch = Batch(addresses(here, [0]), [0], 8 << 20)
    link = mortal.link()
    mortal.peer.stop()
    began = time.monotonic()
    (status,) = link.read(region.region_id, batch, timeout=0.5)
    assert time.monotonic() - began < 0.5 + SLACK
    if status == OK:  # its memory needs no peer that runs
        assert (here == pattern(13, 8 << 20)).all()
    else:
        assert status in (Status.LATE, Status.LOST)
    if link.settles_late:
        link.close(SLACK)
    mortal.peer.go_on()
    link.close(TIMEOUT)
    again = mortal.link()
    assert again.read(region.region_id, batch).tolist() == [OK]
    again.close(TIMEOUT)


def test_a_cancelled_move_ends_soon(pair: Pair) -> None:
    region = pair.peer.register(32 << 20, seed=14)
    there, here = pattern(14, 32 << 20), np.zeros(32 << 20, np.uint8)
    offsets = [i << 18 for i in range(128)]
    link = pair.link()
    move = link.submit_read(region.region_id, Batch(addresses(here, offsets), offsets, 1 << 18))
    move.cancel()
    statuses = move.wait(TIMEOUT + SLACK)
    assert set(statuses.tolist()) <= {OK, Status.CANCELLED}
    for i in np.flatnonzero(statuses == OK).tolist():
        assert (here[i << 18 : (i + 1) << 18] == there[i << 18 : (i + 1) << 18]).all()
    if not link.settles_late:
        here[:] = 0
        batch = Batch(addresses(here, [0]), [0], 1 << 18)
        assert link.read(region.region_id, batch).tolist() == [OK], "the link goes on"
    assert link.close(TIMEOUT + SLACK)


def test_a_closed_link_moves_nothing(pair: Pair) -> None:
    region = pair.peer.register(SIZE, seed=15)
    here = np.zeros(SIZE, np.uint8)
    link = pair.link()
    assert link.close(TIMEOUT)
    assert not link.is_alive
    assert link.read(region.region_id, Batch(addresses(here, [0]), [0], 64))[0] != OK
    assert link.close(TIMEOUT)
    with pytest.raises(StoreClosedError):
        link.submit_read(region.region_id, Batch([], [], []))


def test_who_took_the_place_of_a_dead_peer_is_not_mistaken_for_it(mortal: Pair) -> None:
    mortal.peer.register(SIZE, seed=16)
    stale = mortal.peer.info()
    mortal.peer.kill()
    if mortal.mover == "tcp":
        address = TransportSettings(
            listen=_listening(stale.movers["tcp"]), movers=("tcp",), timeout=TIMEOUT
        )
        replaced = Peer(address, stale.secret)
    else:
        replaced = Peer(_settings(mortal.mover), stale.secret)
    try:
        replaced.register(SIZE, seed=17)
        with pytest.raises(KVStoreError):
            mortal.ours.connect(stale, movers=(mortal.mover,), timeout=TIMEOUT)
        assert replaced.is_running()
    finally:
        replaced.close()


def _listening(info: bytes) -> str:
    from kvstore.transport.tcp import address_in

    return address_in(info)


def test_nobody_is_there(mortal: Pair) -> None:
    mortal.peer.register(SIZE)
    info = mortal.peer.info()
    mortal.peer.kill()
    began = time.monotonic()
    with pytest.raises((PeerUnavailableError, TimeoutError, IncompatibleError)):
        mortal.ours.connect(info, movers=(mortal.mover,), timeout=TIMEOUT)
    assert time.monotonic() - began < TIMEOUT + SLACK


def test_a_forked_child_may_not_use_the_endpoint(pair: Pair) -> None:
    pair.peer.register(SIZE)
    info = pair.peer.info()
    pid = os.fork()
    if pid == 0:
        try:
            pair.ours.connect(info)
        except StoreClosedError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


_moves = st.lists(
    st.tuples(
        st.booleans(),
        st.lists(st.tuples(st.integers(0, 4096), st.integers(0, 4200)), min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=15, deadline=None)
@given(moves=_moves, seed=st.integers(0, 1000))
def test_any_reads_and_writes_leave_what_a_model_says(
    pair: Pair, moves: list[tuple[bool, list[tuple[int, int]]]], seed: int
) -> None:
    """The model: an array; a piece outside of it changes nothing."""
    region = pair.peer.register(4096, writable=True, seed=seed)
    there = pattern(seed, 4096)
    with pair.link() as link:
        for is_read, pieces in moves:
            here = pattern(seed + 1, 4200 * len(pieces))
            wanted = here.copy()
            places = np.arange(len(pieces)) * 4200
            offsets = [offset for offset, _ in pieces]
            lengths = [size for _, size in pieces]
            batch = Batch(addresses(here, places), offsets, lengths)
            move = link.read if is_read else link.write
            if not is_read:  # writes of one batch may come in any order
                batch = batch.pick(slice(0, 1))
            statuses = move(region.region_id, batch)
            for status, (offset, size), place in zip(statuses, pieces, places, strict=False):
                assert status == (OK if offset + size <= 4096 else REFUSED)
                if status == OK and is_read:
                    wanted[place : place + size] = there[offset : offset + size]
                elif status == OK:
                    there[offset : offset + size] = here[place : place + size]
            if not statuses.any():
                assert (here == wanted).all()
    assert pair.peer.contents(region.region_id) == _native.xxh3(there)
