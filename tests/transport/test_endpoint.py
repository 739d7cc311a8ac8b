"""Endpoints: what they say of themselves, which mover two of them choose, what they refuse."""

from __future__ import annotations

import contextlib

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import ConfigError, IncompatibleError, StoreClosedError, _native
from kvstore.transport import (
    Batch,
    Endpoint,
    EndpointInfo,
    RegionInfo,
    SharedMemory,
    Status,
    TransportSettings,
    choices,
)
from kvstore.transport.shm import ShmMover
from kvstore.transport.types import VERSION
from tests.transport.faulty import Faults, FaultyLink

SHM = TransportSettings(movers=("shm",))


def info_with(**changed: object) -> EndpointInfo:
    movers = {"shm": b"", "tcp": b"", "ucx": b""}
    plain = EndpointInfo(VERSION, "boot", 11, 100, "pid:[1]", False, movers, [], b"s" * 32)
    return msgspec.structs.replace(plain, **changed)


def chosen(ours: EndpointInfo, peer: EndpointInfo, *allowed: str) -> tuple[str, str]:
    """The first usable mover, with its reason."""
    found = next(c for c in choices(ours, peer, allowed or None) if c.usable)
    return found.mover, found.reason


def test_the_nearest_way_is_chosen() -> None:
    ours = info_with(epoch=1, pid=7)
    assert chosen(ours, info_with(epoch=2, pid=7)) == ("shm", "same process")
    assert chosen(ours, info_with(pid=8)) == ("shm", "same host")
    assert chosen(ours, info_with(boot_id="other")) == ("tcp", "it always works")
    both = info_with(boot_id="other", has_rdma=True)
    assert chosen(info_with(epoch=1, has_rdma=True), both) == ("ucx", "both have RDMA")
    assert chosen(ours, both) == ("tcp", "it always works")
    assert chosen(ours, both, "ucx", "tcp") == ("ucx", "asked for; without RDMA")


def test_each_mover_that_is_not_chosen_has_a_reason() -> None:
    ours = info_with(epoch=1, pid=7)
    reasons = {c.mover: c.reason for c in choices(ours, info_with(pid_namespace="pid:[2]"))}
    assert "container" in reasons["shm"]
    assert "RDMA" in reasons["ucx"]
    plain = RegionInfo(3, 4096, 4096, False, {"tcp": b""})
    reasons = {c.mover: c.reason for c in choices(ours, info_with(pid=8, regions=[plain]))}
    assert "region 3 is no shared memory" in reasons["shm"]
    reasons = {c.mover: c.reason for c in choices(ours, info_with(movers={}))}
    assert set(reasons.values()) == {"not of the peer's endpoint"}
    with pytest.raises(ConfigError, match="smoke"):
        choices(ours, ours, ["smoke"])


def test_an_endpoint_says_what_a_peer_needs_and_takes_nothing_else() -> None:
    with Endpoint(SHM) as endpoint:
        region = endpoint.register(SharedMemory(8192), writable=True)
        info = EndpointInfo.decode(endpoint.info().encode())
        assert info == endpoint.info()
        assert info.regions == [endpoint.describe(region)]
        assert endpoint.deregister(region)
        assert endpoint.info().regions == []
        with pytest.raises(ConfigError, match="region"):
            endpoint.describe(region)
    newer = msgspec.structs.replace(info, version=VERSION + 1)
    with pytest.raises(IncompatibleError, match=f"version {VERSION + 1}"):
        EndpointInfo.decode(newer.encode())


@given(data=st.binary(max_size=200), cut=st.integers(0, 150), at=st.integers(0, 150))
def test_other_bytes_are_no_endpoint(data: bytes, cut: int, at: int) -> None:
    whole = info_with().encode()
    for other in (data, whole[:cut], whole[:at] + data + whole[at + len(data) :]):
        with contextlib.suppress(IncompatibleError):  # the bytes may do by chance
            assert EndpointInfo.decode(other).version == VERSION


def test_nothing_listens_beyond_loopback_without_a_secret() -> None:
    for listen in ("0.0.0.0", "10.1.2.3:9000", "::"):
        with pytest.raises(ConfigError, match="secret"):
            Endpoint(TransportSettings(listen=listen, movers=("shm",)))
    with pytest.raises(ConfigError, match="secret"):
        Endpoint(SHM, secret=b"short")


def test_wrong_memory_and_settings_are_named() -> None:
    with Endpoint(SHM) as endpoint:
        for memory in ((0, 10), (4096, 0), (4096, -1), (1 << 63, 1)):
            with pytest.raises(ConfigError, match="memory"):
                endpoint.register(memory)
        with pytest.raises(ConfigError, match="contiguous"):
            endpoint.register(np.zeros((8, 8), np.uint8)[:, :4])
    with pytest.raises(ConfigError, match="num_bytes"):
        SharedMemory(0)
    with pytest.raises(ConfigError, match="timeout"):
        TransportSettings(timeout=0)
    with pytest.raises(ConfigError, match="remote_offsets"):
        Batch([1, 2], [1], 5)
    with pytest.raises(StoreClosedError):
        endpoint.info()


def test_within_a_process_memory_is_copied_and_needs_no_file() -> None:
    there = np.arange(4096, dtype=np.uint32).view(np.uint8)
    here = np.zeros(4096, np.uint8)
    with Endpoint(SHM) as one, Endpoint(SHM) as two:
        region = two.register(there)
        link = one.connect(two.info())
        assert (link.mover, link.reason) == ("shm", "same process")
        batch = Batch([here.ctypes.data], [1024], 4096, [_native.xxh3(there[1024:5120])])
        assert link.read(region.region_id, batch).tolist() == [Status.OK]
        assert (here == there[1024:5120]).all()
        assert link.write(region.region_id, batch).tolist() == [Status.REFUSED]
        two.deregister(region)
        assert link.read(region.region_id, batch).tolist() == [Status.REFUSED]
        two.close()
        assert not link.is_alive
        assert link.read(region.region_id, batch).tolist() == [Status.LOST]


def test_a_link_with_faults_is_honest_about_them() -> None:
    """Otherwise no test that uses one would prove anything."""
    there = np.random.default_rng(1).integers(0, 256, 64 << 10, dtype=np.uint8)
    offsets = np.arange(64) << 10
    sums = [_native.xxh3(there[at : at + 1024]) for at in offsets]
    owner, user = ShmMover(21), ShmMover(22)
    try:
        with Endpoint(SHM) as serving:
            region = serving.register(there)
            inner = user.connect(serving.info(), 1.0)
            faults = Faults(seed=3, drop=0.2, corrupt=0.2, reorder=True)
            link = FaultyLink(inner, faults)
            here = np.zeros_like(there)
            batch = Batch(offsets + here.ctypes.data, offsets, 1024, sums)
            statuses = link.read(region.region_id, batch, 0.5, None)
            assert {0, Status.DAMAGED, Status.LATE} == set(statuses.tolist())
            assert faults.struck == np.count_nonzero(statuses)
            for at, status in zip(offsets, statuses, strict=True):
                is_same = (here[at : at + 1024] == there[at : at + 1024]).all()
                assert is_same == (status == Status.OK)
            faults.drop = faults.corrupt = 0.0
            faults.die_after = 10
            statuses = link.read(region.region_id, batch, 1.0, None)
            assert sorted(statuses.tolist()) == [0] * 10 + [Status.LOST] * 54
            assert not link.is_alive
    finally:
        owner.close()
        user.close()
