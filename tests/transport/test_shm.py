"""Pointer copy: memory outlives what is under way in it, and peers that say wrong things are named.

A copy is held up at a known point, and the region is deregistered, or an end closed, meanwhile.
Descriptions of peers are changed as a buggy one might.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest

from kvstore import IncompatibleError, PeerUnavailableError
from kvstore.transport import Batch, Endpoint, Link, SharedMemory, Status, TransportSettings, shm
from kvstore.transport.processes import start_of
from kvstore.transport.types import EndpointInfo, RegionInfo
from tests.transport.peer import Peer

SHM = TransportSettings(movers=("shm",))


class HeldCopy:
    """Copies wait for `go` once `begun` is set."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        copy = shm._copy

        def wait(*arguments: object) -> object:
            self.begun.set()
            assert self.go.wait(30)
            return copy(*arguments)  # type: ignore[arg-type]

        patch.setattr(shm, "_copy", wait)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> HeldCopy:
    return HeldCopy(monkeypatch)


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    made = Peer(SHM)
    try:
        yield made
    finally:
        made.close()


def read(link: Link, region_id: int) -> list[int]:
    here = np.zeros(4096, np.uint8)
    return list(link.read(region_id, Batch([here.ctypes.data], [0], 4096)).tolist())


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_region_is_not_let_go_of_while_a_thread_here_copies_it(held: HeldCopy) -> None:
    memory = np.zeros(4096, np.uint8)
    with Endpoint(SHM) as ours, Endpoint(SHM) as theirs, ThreadPoolExecutor() as pool:
        region = theirs.register(memory)
        link = ours.connect(theirs.info())
        moving = pool.submit(read, link, region.region_id)
        assert held.begun.wait(30)
        assert not theirs.deregister(region, 0.0)
        assert read(link, region.region_id) == [Status.REFUSED]
        held.go.set()
        assert theirs.deregister(region)
        assert moving.done() or moving.result(30) == [Status.OK]


def test_an_endpoint_is_closed_when_no_thread_here_copies_its_memory(held: HeldCopy) -> None:
    with Endpoint(SHM) as ours, ThreadPoolExecutor() as pool:
        theirs = Endpoint(SHM)
        region = theirs.register(np.zeros(4096, np.uint8))
        link = ours.connect(theirs.info())
        moving = pool.submit(read, link, region.region_id)
        assert held.begun.wait(30)
        closing = pool.submit(theirs.close)
        while link.is_alive:
            pass
        assert not closing.done()
        held.go.set()
        closing.result(30)
        assert moving.result(30) == [Status.CANCELLED]  # not begun when the endpoint was closed


def test_what_a_link_has_open_is_closed_by_the_last_move(held: HeldCopy, peer: Peer) -> None:
    described = peer.register(4096, writable=True)
    with Endpoint(SHM) as ours, ThreadPoolExecutor() as pool:
        before = num_descriptors()
        link = ours.connect(peer.info())
        link.add_region(described)  # again: nothing more is open for it
        moving = pool.submit(read, link, described.region_id)
        assert held.begun.wait(30)
        assert not link.close(0.0)
        assert not peer.deregister(described.region_id)  # it might still be written to
        held.go.set()
        moving.result(30)
        assert link.close()
        assert num_descriptors() == before
        assert peer.deregister(described.region_id)
        with pytest.raises(PeerUnavailableError):
            link.add_region(described)
        assert num_descriptors() == before


def test_memory_that_is_served_no_more_is_not_read(peer: Peer) -> None:
    """It is mapped here still, and may hold anything by now."""
    described = peer.register(4096)
    with Endpoint(SHM) as ours, ours.connect(peer.info()) as link:
        assert read(link, described.region_id) == [Status.OK]
        assert peer.deregister(described.region_id)
        assert read(link, described.region_id) == [Status.REFUSED]


def test_a_file_that_could_shrink_is_not_mapped(peer: Peer) -> None:
    """Whoever reads a mapped file beyond its end is killed."""
    info = peer.info()
    fd = os.memfd_create("kvstore-test")
    os.ftruncate(fd, 4096)
    key = msgspec.msgpack.encode((fd, 0, os.fstat(fd).st_ino))
    mine = msgspec.structs.replace(info, pid=os.getpid(), movers={"shm": started_here()})
    region = RegionInfo(1, 4096, 4096, False, {"shm": key})
    with Endpoint(SHM) as ours:
        before = num_descriptors()
        with pytest.raises(IncompatibleError, match="could shrink"):
            ours.connect(msgspec.structs.replace(mine, regions=[region]))
        assert num_descriptors() == before
    os.close(fd)


def started_here() -> bytes:
    return msgspec.msgpack.encode((start_of(os.getpid()),))


@pytest.mark.parametrize("offset", [-4096, 1 << 62])
def test_a_region_outside_of_its_file_is_refused(peer: Peer, offset: int) -> None:
    peer.register(8192)
    info = peer.info()
    fd, _, inode = msgspec.msgpack.decode(info.regions[-1].keys["shm"])
    key = msgspec.msgpack.encode((fd, offset, inode))
    regions = [msgspec.structs.replace(info.regions[-1], keys={"shm": key})]
    with Endpoint(SHM) as ours, pytest.raises(IncompatibleError):
        ours.connect(msgspec.structs.replace(info, regions=regions))


def test_a_peer_that_says_what_is_none_of_ours_is_incompatible(peer: Peer) -> None:
    peer.register(8192)
    info = peer.info()
    keys = [msgspec.structs.replace(info.regions[-1], keys={"shm": b"?"})]
    with Endpoint(SHM) as ours:
        before = num_descriptors()
        for wrong in (
            msgspec.structs.replace(info, movers={"shm": b"?"}),
            msgspec.structs.replace(info, regions=keys),
        ):
            with pytest.raises(IncompatibleError, match="shm"):
                ours.connect(wrong)
        assert num_descriptors() == before


@pytest.mark.parametrize(
    ("field", "value"), [("region_id", -1), ("num_bytes", 0), ("num_bytes", -5), ("address", -1)]
)
def test_regions_of_impossible_sizes_are_no_description(field: str, value: int) -> None:
    with Endpoint(SHM) as endpoint:
        endpoint.register(SharedMemory(4096))
        info = endpoint.info()
    regions = [msgspec.structs.replace(info.regions[0], **{field: value})]
    with pytest.raises(IncompatibleError):
        EndpointInfo.decode(msgspec.structs.replace(info, regions=regions).encode())


def test_no_link_within_a_process_outlives_a_fork() -> None:
    """The child's memory is its own: what it wrote there nobody would see."""
    with Endpoint(SHM) as ours, Endpoint(SHM) as theirs:
        link = ours.connect(theirs.info())
        assert link.is_alive
        pid = os.fork()
        if pid == 0:
            os._exit(int(link.is_alive))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
