"""Proves that a region of one process's GPU is read and written by another, after what it was told
to wait for; that its owner knows who has it open; and that nothing is held of an owner that died.

Two processes, over the fake driver, whose memory and events other processes open as CUDA's are; and
over the machine's own with `-m gpu`.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from kvstore import ConfigError, GpuError, IncompatibleError, PeerUnavailableError, _native
from kvstore._native import CancelFlag
from kvstore.gpu import CudaDevice
from kvstore.gpu.device import Memory
from kvstore.transport import Batch, Endpoint, Link, Status, TransportSettings
from tests.gpu.fake_cuda import ALLOCATIONS, EVENTS, OPENED, FakeCuda
from tests.gpu.ipc_peer import IpcPeer
from tests.transport.peer import pattern

SIZE = 1 << 20
OK, REFUSED, LOST, LATE = Status.OK, Status.REFUSED, Status.LOST, Status.LATE


def until(is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10.0
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_so()


@dataclass
class Pair:
    ours: Endpoint
    peer: IpcPeer
    device: CudaDevice
    memory: Memory
    fake: FakeCuda | None

    def link(self) -> Link:
        return self.ours.connect(self.peer.info(), timeout=10.0)

    def batch(self, offsets: list[int], size: int) -> Batch:
        places = [self.memory.address + i * size for i in range(len(offsets))]
        return Batch(places, offsets, size)

    def read(self, num_bytes: int) -> np.ndarray:
        return self.device.read(self.memory.address, num_bytes)


@pytest.fixture(params=["fake", pytest.param("gpu", marks=pytest.mark.gpu)])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    fake: FakeCuda | None = None
    library = ""
    if request.param == "gpu":
        device: CudaDevice = request.getfixturevalue("gpu")
    else:
        fake = request.getfixturevalue("fake")
        library = fake.path
        device = fake.device()
    peer = IpcPeer(library, late=fake is not None)
    ours = Endpoint(TransportSettings(movers=("cuda",), cuda_library=library))
    memory = device.allocate(SIZE)
    yield Pair(ours, peer, device, memory, fake)
    ours.close()
    peer.close()
    memory.close()
    if fake is not None:
        device.close()


def test_pieces_are_read_exactly(pair: Pair) -> None:
    region = pair.peer.register(SIZE, offset=4096, seed=3)
    with pair.link() as link:
        assert link.mover == "cuda"
        batch = pair.batch([5 * 4096, 0, SIZE - 4096], 4096)
        assert (link.read(region.region_id, batch) == OK).all()
    want = pattern(3, SIZE).reshape(-1, 4096)[[5, 0, SIZE // 4096 - 1]].ravel()
    assert np.array_equal(pair.read(3 * 4096), want)


def test_pieces_are_written_exactly(pair: Pair) -> None:
    region = pair.peer.register(SIZE, writable=True, seed=3)
    fixed = pair.peer.register(SIZE, seed=3)
    data = pattern(8, 3 * 4096)
    pair.device.write(pair.memory.address, data)
    batch = pair.batch([4096, 0, 8 * 4096], 4096)
    with pair.link() as link:
        assert (link.write(region.region_id, batch) == OK).all()
        assert (link.write(fixed.region_id, batch) == REFUSED).all()
    want = pattern(3, SIZE).reshape(-1, 4096)
    want[[1, 0, 8]] = data.reshape(-1, 4096)
    digest = pair.peer.ask("digest", region=region.region_id)["digest"]
    assert digest == _native.xxh3(want.ravel())


def test_what_is_out_of_bounds_or_not_the_gpus_is_refused(pair: Pair) -> None:
    region = pair.peer.register(SIZE, seed=3)
    host = np.zeros(4096, np.uint8)
    here = pair.memory.address
    with pair.link() as link:
        batch = Batch([here, here + 4096, host.ctypes.data], [0, SIZE - 8, 0], 4096)
        assert link.read(region.region_id, batch).tolist() == [OK, REFUSED, REFUSED]
        assert (link.read(999, pair.batch([0], 8)) == REFUSED).all()
    assert not host.any()


def test_checksums_are_compared_with_what_arrived(pair: Pair) -> None:
    region = pair.peer.register(SIZE, seed=3)
    right = _native.xxh3(pattern(3, SIZE)[:4096])
    batch = Batch(pair.batch([0, 0], 4096).local_addresses, [0, 0], 4096, [right, right ^ 1])
    with pair.link() as link:
        assert link.read(region.region_id, batch).tolist() == [OK, Status.DAMAGED]


def test_host_memory_that_is_registered_is_a_place_for_pieces(pair: Pair) -> None:
    region = pair.peer.register(SIZE, seed=3)
    host = np.zeros(3 * 4096, np.uint8)
    page = -(-host.ctypes.data // 4096) * 4096
    pair.device.register(page, 4096, read_only=False)
    with pair.link() as link:
        assert (link.read(region.region_id, Batch([page], [4096], 4096)) == OK).all()
    pair.device.unregister(page)
    at = page - host.ctypes.data
    assert np.array_equal(host[at : at + 4096], pattern(3, SIZE)[4096:8192])


def test_a_read_waits_for_what_the_owner_marked(pair: Pair) -> None:
    region = pair.peer.register(SIZE, seed=3)
    with pair.link() as link:
        pair.peer.ask("fill", region=region.region_id, seed=4)
        if pair.fake is not None:  # whose peer runs nothing before it is told to
            early = link.read(region.region_id, pair.batch([0], 4096), timeout=0.2)
            assert (early == LATE).all()
            assert not link.close(0.0), "the copy is still to come"
            pair.peer.ask("run")
            assert link.close(10.0)
        else:
            pair.peer.ask("run")
    with pair.link() as link:
        assert (link.read(region.region_id, pair.batch([0], SIZE)) == OK).all()
    assert np.array_equal(pair.read(SIZE), pattern(4, SIZE))


def test_a_cancelled_read_says_so(pair: Pair) -> None:
    if pair.fake is None:
        pytest.skip("needs a copy that takes as long as it is told to")
    region = pair.peer.register(SIZE, seed=3)
    with pair.link() as link:
        pair.peer.ask("fill", region=region.region_id, seed=4)
        flag = CancelFlag()
        flag.set()
        statuses = link.read(region.region_id, pair.batch([0], 8), timeout=10.0, cancel=flag)
        assert (statuses == Status.CANCELLED).all()
        pair.peer.ask("run")


def test_the_owner_knows_who_has_its_memory_open(pair: Pair) -> None:
    region = pair.peer.register(SIZE)
    first, second = pair.link(), pair.link()
    if pair.fake is not None:
        assert pair.fake.live(OPENED) == 1, "two links share what is open"
    assert not pair.peer.ask("deregister", region=region.region_id)["settled"]
    assert first.close()
    assert not pair.peer.ask("deregister", region=region.region_id)["settled"]
    assert second.close()
    assert pair.peer.ask("deregister", region=region.region_id)["settled"]
    with pytest.raises(PeerUnavailableError, match="served no more"):
        pair.link().add_region(region)


def test_an_owner_that_dies_is_seen_and_its_memory_closed(pair: Pair) -> None:
    region = pair.peer.register(SIZE)
    link = pair.link()
    events = pair.fake.live(EVENTS) if pair.fake else 0
    pair.peer.process.kill()
    pair.peer.process.wait()
    assert not link.is_alive
    assert (link.read(region.region_id, pair.batch([0], 8)) == LOST).all()
    if pair.fake is not None:
        fake = pair.fake
        assert until(lambda: fake.live(OPENED) == 0), "closed without being asked"
        assert fake.live(EVENTS) < events
    assert link.close()


def test_a_peer_that_dies_lets_its_owner_free_the_memory(pair: Pair) -> None:
    region = pair.ours.register((pair.memory.address, SIZE))
    pair.peer.ask("open", info=base64.b64encode(pair.ours.info().encode()).decode())
    assert not pair.ours.deregister(region)
    pair.peer.process.kill()
    pair.peer.process.wait()
    assert pair.ours.deregister(region)


def test_memory_that_cannot_be_shared_is_refused_by_name(fake: FakeCuda) -> None:
    with Endpoint(TransportSettings(movers=("cuda",), cuda_library=fake.path)) as ours:
        with pytest.raises(GpuError, match="expandable_segments"):
            ours.register((fake.allocate_mapped(SIZE), SIZE))
        device = fake.device()
        memory = device.allocate(4096)
        with pytest.raises(ConfigError, match="more than one allocation"):
            ours.register((memory.address, 8192))
        host = np.zeros(4096, np.uint8)
        assert ours.describe(ours.register(host)).keys == {}
        memory.close()
        device.close()


def test_memory_of_this_process_is_reached_without_a_handle(fake: FakeCuda) -> None:
    settings = TransportSettings(movers=("cuda",), cuda_library=fake.path)
    device = fake.device()
    memory = device.allocate(8192)
    device.write(memory.address, pattern(1, 8192))
    with Endpoint(settings) as ours, Endpoint(settings) as theirs:
        region = theirs.register((memory.address, 4096))
        with ours.connect(theirs.info()) as link:
            assert (
                link.read(region.region_id, Batch([memory.address + 4096], [0], 4096)) == 0
            ).all()
            assert fake.live(OPENED) == 0
            assert theirs.deregister(region)
            assert (link.read(region.region_id, Batch([memory.address], [0], 1)) == REFUSED).all()
    assert np.array_equal(device.read(memory.address + 4096, 4096), pattern(1, 8192)[:4096])
    memory.close()
    device.close()
    assert fake.live(ALLOCATIONS) == 0


def test_movers_of_host_memory_and_of_gpus_do_not_mix(fake: FakeCuda) -> None:
    with pytest.raises(ConfigError, match="goes alone"):
        TransportSettings(movers=("shm", "cuda"))
    host = Endpoint(TransportSettings(movers=("shm",)))
    gpu = Endpoint(TransportSettings(movers=("cuda",), cuda_library=fake.path))
    with pytest.raises(IncompatibleError, match="not of the peer's endpoint"):
        gpu.connect(host.info())
    host.close()
    gpu.close()


def test_no_driver_is_named(tmp_path: object) -> None:
    with pytest.raises(GpuError, match="no CUDA driver"):
        Endpoint(TransportSettings(movers=("cuda",), cuda_library=f"{tmp_path}/none.so"))
