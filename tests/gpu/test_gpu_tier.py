"""The contract of the GPU tier: what it loads are exactly the bytes that were put, or it says less.

Over each device, late ones included, above an embedded store; and a model with several streams that
run in any order, in which bytes follow from a block's hash, so that a block in a wrong place shows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import kvstore
from kvstore import BlockHashes, ConfigError, GpuError, Store, StoreClosedError
from kvstore.gpu import Device, DeviceBlocks, HostDevice
from kvstore.gpu_tier import GpuTier, GpuTransfer
from tests.gpu.fake_cuda import REGISTERED, FakeCuda
from tests.gpu.support import View
from tests.store_support import (
    BLOCK_BYTES,
    NAMESPACE,
    SPEC,
    WAIT_S,
    assert_exact,
    chain,
    load,
    open_store,
    payload,
    put,
)

PAGES = 12


class Pages:
    """An engine's pages on a device, each a K and a V part for each layer, apart."""

    def __init__(self, device: Device, num_pages: int = PAGES) -> None:
        self.device = device
        self.num_pages = num_pages
        self.memory = device.allocate(num_pages * BLOCK_BYTES)
        shape = (SPEC.num_layers, 2, num_pages, SPEC.block_tokens, 1, SPEC.head_dim)
        self._shape = shape
        layer_bytes = self.memory.num_bytes // SPEC.num_layers
        layers = [
            View(self.memory.address + layer * layer_bytes, shape[1:], "<f4")
            for layer in range(shape[0])
        ]
        self.blocks = DeviceBlocks.paged(device, "vllm_nhd", layers, SPEC)

    def read(self, ids: Any) -> Any:
        """Blocks as canonical bytes."""
        raw = self.device.read(self.memory.address, self.memory.num_bytes)
        pages = raw.view(np.float32).reshape(self._shape)[:, :, np.asarray(ids, np.int64)]
        return np.ascontiguousarray(np.moveaxis(pages, 2, 0)).view(np.uint8).reshape(len(ids), -1)

    def write(self, ids: Any, blocks: Any) -> None:
        raw = self.device.read(self.memory.address, self.memory.num_bytes)
        pages = raw.view(np.float32).reshape(self._shape)
        parts = np.ascontiguousarray(blocks).view(np.float32)
        shaped = parts.reshape(len(ids), SPEC.num_layers, 2, SPEC.block_tokens, 1, SPEC.head_dim)
        pages[:, :, np.asarray(ids, np.int64)] = np.moveaxis(shaped, 0, 2)
        self.device.write(self.memory.address, raw)


class Setup:
    def __init__(self, device: Device, slots: int = 8) -> None:
        self.device = device
        self.store = open_store()
        self.pages = Pages(device)
        self.tier = GpuTier(
            self.store.control, device, slots * BLOCK_BYTES, stage_bytes=4 * BLOCK_BYTES
        )
        self.stream = device.new_stream()

    def put(self, hashes: BlockHashes, ids: Any) -> kvstore.TransferResult:
        self.pages.write(ids, payload(hashes))
        moved = self.tier.put(hashes, self.pages.blocks, ids, stream=self.stream)
        return moved.wait(WAIT_S)

    def load(self, hashes: BlockHashes, ids: Any) -> int:
        self.pages.write(ids, np.zeros((len(ids), BLOCK_BYTES), np.uint8))
        moved = self.tier.load(hashes, self.pages.blocks, ids, stream=self.stream)
        result = moved.wait(WAIT_S)
        assert result.num_blocks + result.num_missed == len(hashes)
        assert_exact(hashes, self.pages.read(ids), result.num_blocks)
        return result.num_blocks

    def close(self) -> None:
        assert self.tier.close(WAIT_S)
        self.device.close_stream(self.stream)
        self.pages.blocks.close()
        self.pages.memory.close()
        self.store.close()


@pytest.fixture
def at(device: Device) -> Iterator[Setup]:
    setup = Setup(device)
    yield setup
    setup.close()


def test_what_was_put_is_loaded_from_the_pool(at: Setup) -> None:
    hashes = chain(1, 5)
    assert at.put(hashes, [3, 1, 4, 0, 5]).num_stored == 5
    assert at.tier.lookup(hashes) == (5, 5)
    assert at.load(hashes, [11, 2, 7, 8, 6]) == 5


def test_what_was_put_is_in_the_store_too(at: Setup) -> None:
    hashes = chain(1, 5)
    at.put(hashes, [3, 1, 4, 0, 5])
    assert load(at.store, hashes) == 5


def test_what_is_in_the_store_is_loaded_and_stays_in_the_pool(at: Setup) -> None:
    hashes = chain(1, 6)
    put(at.store, hashes)
    assert at.tier.lookup(hashes) == (6, 0)
    assert at.load(hashes, range(6)) == 6
    assert at.tier.lookup(hashes) == (6, 6)
    at.store.clear()
    assert at.load(hashes, [9, 8, 7, 6, 5, 4]) == 6


def test_a_prefix_in_the_pool_and_the_rest_in_the_store(at: Setup) -> None:
    hashes = chain(1, 7)
    at.put(hashes[:3], range(3))
    put(at.store, hashes)
    assert at.tier.lookup(hashes) == (7, 3)
    assert at.load(hashes, range(5, 12)) == 7


def test_more_than_the_pool_holds_passes_by_it(at: Setup) -> None:
    hashes = chain(1, 11)
    assert at.put(hashes, range(11)).num_blocks == 11
    assert at.tier.lookup(hashes) == (11, 8)
    assert at.load(hashes, [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]) == 11


def test_a_full_pool_evicts_what_was_not_used(at: Setup) -> None:
    first, second = chain(1, 5), chain(2, 5)
    at.put(first, range(5))
    at.put(second, range(5))
    assert at.tier.lookup(second) == (5, 5)
    assert at.tier.lookup(first) == (5, 3)
    assert at.tier.num_evicted == 2
    assert at.load(first, range(5)) == 5


def test_misses_are_counted(at: Setup) -> None:
    hashes = chain(1, 4)
    assert at.load(hashes, range(4)) == 0
    at.put(hashes[:2], range(2))
    assert at.load(hashes, range(4)) == 2


def test_removed_blocks_are_gone_from_both(at: Setup) -> None:
    hashes = chain(1, 4)
    at.put(hashes, range(4))
    assert at.tier.remove(hashes[2:3]) == 1
    assert at.tier.lookup(hashes) == (2, 2)
    at.tier.clear()
    assert at.tier.lookup(hashes) == (2, 0)


def test_put_again_stores_nothing(at: Setup) -> None:
    hashes = chain(1, 4)
    at.put(hashes, range(4))
    again = at.put(hashes, range(4))
    assert (again.num_blocks, again.num_stored, again.num_present) == (4, 0, 4)


def test_a_lease_that_ended_meanwhile_is_a_miss() -> None:
    at = Setup(HostDevice(late=True))
    hashes = chain(1, 4)
    put(at.store, hashes)
    control = at.store.control
    real = control.acquire

    def short(hashes: BlockHashes, ttl: float | None, timeout: float) -> Any:
        granted = real(hashes, ttl, timeout)
        control.release(granted.lease)
        at.store.clear()
        put(at.store, chain(9, 15))  # the slots are others' now
        return granted

    control.acquire = short  # type: ignore[method-assign]
    moved = at.tier.load(hashes, at.pages.blocks, range(4), stream=at.stream)
    assert moved.wait(WAIT_S).num_blocks == 0
    control.acquire = real  # type: ignore[method-assign]
    assert at.tier.lookup(hashes) == (0, 0), "wrong bytes must not stay in the pool"
    at.close()


def test_arguments_are_checked(at: Setup) -> None:
    hashes = chain(1, 2)
    for ids, error in (([0, 99], IndexError), ([1, 1], ValueError), ([0], ConfigError)):
        with pytest.raises(error):
            at.tier.load(hashes, at.pages.blocks, ids, stream=at.stream)
    others = Pages(HostDevice()).blocks
    with pytest.raises(ConfigError, match="another device"):
        at.tier.load(hashes, others, [0, 1], stream=at.stream)
    with pytest.raises(ConfigError, match="capacity"):
        GpuTier(at.store.control, at.device, BLOCK_BYTES - 1)


def test_a_closed_tier_says_so(device: Device) -> None:
    setup = Setup(device)
    setup.put(chain(1, 2), [0, 1])
    setup.tier.close()
    with pytest.raises(StoreClosedError):
        setup.tier.load(chain(1, 2), setup.pages.blocks, [0, 1], stream=setup.stream)
    setup.close()


def test_transfers_do_not_wait_for_streams() -> None:
    device = HostDevice(late=True)
    setup = Setup(device)
    hashes = chain(1, 4)
    setup.pages.write(range(4), payload(hashes))
    saved = setup.tier.put(hashes, setup.pages.blocks, range(4), stream=setup.stream)
    # The same stream: nothing has run yet, and yet the load finds what the put will bring.
    came = setup.tier.load(hashes, setup.pages.blocks, range(6, 10), stream=setup.stream)
    assert came.wait(WAIT_S).num_blocks == 4
    assert_exact(hashes, setup.pages.read(range(6, 10)), 4)
    assert saved.wait(WAIT_S).num_stored == 4
    setup.close()


@pytest.mark.parametrize("name", ["cuLaunchKernel", "cuMemcpyBatchAsync", "cuMemHostRegister"])
def test_a_refused_call_costs_the_transfer_and_nothing_more(fake: FakeCuda, name: str) -> None:
    device = fake.device()
    setup = Setup(device)
    first, second = chain(1, 3), chain(2, 3)
    setup.pages.write(range(3), payload(first))
    fake.inject(name, 1)
    with pytest.raises(GpuError):
        setup.tier.put(first, setup.pages.blocks, range(3), stream=setup.stream)
    assert load(setup.store, first) == 0
    assert setup.put(second, range(3)).num_stored == 3
    setup.tier.clear()
    fake.inject(name, 1)
    if name != "cuMemHostRegister":
        with pytest.raises(GpuError):
            setup.tier.load(second, setup.pages.blocks, range(3), stream=setup.stream)
    fake.inject(name, 0)
    assert setup.load(second, range(3)) == 3
    setup.close()
    assert fake.live(REGISTERED) == 0


def test_work_that_fails_on_the_gpu_is_raised_by_wait(fake: FakeCuda) -> None:
    fake.set_late(True)
    setup = Setup(fake.device())
    hashes = chain(1, 3)
    put(setup.store, hashes)
    moved = setup.tier.load(hashes, setup.pages.blocks, range(3), stream=setup.stream)
    fake.inject("cuEventQuery", 700)
    with pytest.raises(GpuError, match="work on a stream failed"):
        moved.wait(WAIT_S)
    assert setup.tier.lookup(hashes) == (3, 0)
    assert setup.load(hashes, range(3)) == 3
    setup.close()


class Machine(RuleBasedStateMachine):
    """Two streams that run in any order; three chains with a common prefix; a small pool."""

    @initialize()
    def start(self) -> None:
        self.device = HostDevice(late=True)
        self.store: Store = kvstore.open(NAMESPACE, cpu="1MiB", chunk="1MiB")
        self.pages = Pages(self.device, 24)
        self.tier = GpuTier(
            self.store.control, self.device, 5 * BLOCK_BYTES, stage_bytes=4 * BLOCK_BYTES
        )
        self.streams = [self.device.new_stream() for _ in range(2)]
        self.free = list(range(24))  # pages that nothing uses
        self.saves: list[tuple[GpuTransfer, list[int]]] = []
        self.loads: list[tuple[GpuTransfer, list[int], BlockHashes]] = []
        self.deadline = time.monotonic() + 60

    def chain(self, seed: int, size: int) -> BlockHashes:
        shared = chain(0, 2)
        return (shared + chain(seed + 1, 6, parent=shared))[:size]

    @rule(seed=st.integers(0, 2), size=st.integers(1, 8), on=st.integers(0, 1))
    def put(self, seed: int, size: int, on: int) -> None:
        hashes = self.chain(seed, size)
        if len(self.free) < size:
            return
        ids, self.free = self.free[:size], self.free[size:]
        self.pages.write(ids, payload(hashes))
        moved = self.tier.put(hashes, self.pages.blocks, ids, stream=self.streams[on])
        self.saves.append((moved, ids))

    @rule(seed=st.integers(0, 2), size=st.integers(1, 8), on=st.integers(0, 1))
    def load(self, seed: int, size: int, on: int) -> None:
        if len(self.free) < size:
            return
        ids, self.free = self.free[:size], self.free[size:]
        hashes = self.chain(seed, size)
        moved = self.tier.load(hashes, self.pages.blocks, ids, stream=self.streams[on])
        self.loads.append((moved, ids, hashes))

    @rule(on=st.integers(0, 2), steps=st.integers(1, 6))
    def run(self, on: int, steps: int) -> None:
        streams = [*self.streams, self.tier._pool.out]
        for _ in range(steps):
            self.device.advance(streams[on])

    @precondition(lambda self: self.saves)
    @rule(data=st.data())
    def end_put(self, data: st.DataObject) -> None:
        moved, ids = self.saves.pop(data.draw(st.integers(0, len(self.saves) - 1)))
        moved.wait(WAIT_S)
        self.free += ids

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def end_load(self, data: st.DataObject) -> None:
        self.check(self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1))))

    def check(self, under_way: tuple[GpuTransfer, list[int], BlockHashes]) -> None:
        moved, ids, hashes = under_way
        count = moved.wait(WAIT_S).num_blocks
        assert_exact(hashes, self.pages.read(ids), count)
        self.free += ids

    @rule(seed=st.integers(0, 2), place=st.integers(0, 7), below=st.booleans())
    def remove(self, seed: int, place: int, below: bool) -> None:
        hashes = self.chain(seed, place + 1)[place:]
        if below:
            self.store.remove(hashes)
        else:
            self.tier.remove(hashes)

    @rule()
    def clear(self) -> None:
        self.tier.clear()

    def teardown(self) -> None:
        for moved, _ in self.saves:
            moved.wait(WAIT_S)
        for under_way in self.loads:
            self.check(under_way)
        hashes = self.chain(0, 8)
        load(self.store, hashes)
        assert self.tier.close(WAIT_S)
        assert not self.tier._pool.table._uses.any(), "every use has ended"
        self.store.close()


Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestModel = Machine.TestCase
