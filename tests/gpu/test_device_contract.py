"""The contract of every device: copies in the order of streams and events, and no waiting.

Over host memory, the fake driver, both as late as they may be, and with `-m gpu` the machine's GPU.
"""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from kvstore import BlockSpec, ConfigError, GpuError
from kvstore.gpu import CudaDevice, Device, DeviceBlocks, HostDevice, available
from kvstore.gpu.copies import ArenaCopies, Way
from kvstore.gpu.cuda_device import SLIPS_MAX
from kvstore.gpu.device import wait_for
from kvstore.gpu.registration import HostRegistration, Registrations
from kvstore.transport import SharedMemory
from tests.gpu.fake_cuda import ALLOCATIONS, EVENTS, PINNED, REGISTERED, STREAMS, FakeCuda
from tests.gpu.support import View, finish, u64

PAGE = 4096


def host_pages(num_pages: int, seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(0, 256, (num_pages + 1) * PAGE, dtype=np.uint8)
    begin = -raw.ctypes.data % PAGE
    return raw[begin : begin + num_pages * PAGE]


def test_copies_go_to_and_from_registered_memory(device: Device) -> None:
    host = host_pages(4)
    stream, memory = device.new_stream(), device.allocate(4 * PAGE)
    with pytest.raises(GpuError):
        device.copy(u64([memory.address]), u64([host.ctypes.data]), u64([PAGE]), stream)
    registered = HostRegistration(device, host)
    own = host.ctypes.data + PAGE * np.arange(4)
    there = memory.address + PAGE * np.arange(4)
    device.copy(u64(there), u64(own[::-1]), u64([PAGE] * 4), stream, is_from_host=True)
    finish(device.record(stream))
    assert np.array_equal(device.read(memory.address, 4 * PAGE), host.reshape(4, -1)[::-1].ravel())
    device.write(memory.address, np.full(4 * PAGE, 7, np.uint8))
    device.copy(u64(own[:2]), u64(there[:2]), u64([PAGE, 5]), stream)
    finish(device.record(stream))
    assert (host[: PAGE + 5] == 7).all()
    assert not (host[PAGE + 5 : 2 * PAGE] == 7).all()
    registered.close()
    memory.close()
    device.close_stream(stream)


def test_events_order_streams(device: Device) -> None:
    first, second = device.new_stream(), device.new_stream()
    a, b, c = (device.allocate(PAGE) for _ in range(3))
    device.write(a.address, np.full(PAGE, 1, np.uint8))
    device.copy(u64([b.address]), u64([a.address]), u64([PAGE]), first)
    device.wait_event(second, device.record(first))
    device.copy(u64([c.address]), u64([b.address]), u64([PAGE]), second)
    finish(device.record(second))
    assert (device.read(c.address, PAGE) == 1).all()
    for memory in (a, b, c):
        memory.close()
    for stream in (first, second):
        device.close_stream(stream)


def test_many_launches_may_be_under_way(device: Device) -> None:
    """Each is told its blocks by memory of its own, until it has run."""
    stream = device.new_stream()
    pages, out = device.allocate(8 * 256), device.allocate(SLIPS_MAX * 256)
    data = np.repeat(np.arange(8, dtype=np.uint8), 256)
    device.write(pages.address, data)
    blocks = DeviceBlocks.contiguous(device, View(pages.address, (8, 256)))
    for i in range(SLIPS_MAX - 1):
        device.gather(blocks.prepared, np.array([i % 8]), u64([out.address + i * 256]), stream)
    finish(device.record(stream))
    got = device.read(out.address, (SLIPS_MAX - 1) * 256).reshape(-1, 256)
    assert (got == (np.arange(SLIPS_MAX - 1) % 8)[:, None]).all()
    blocks.close()
    for memory in (pages, out):
        memory.close()
    device.close_stream(stream)


@pytest.mark.parametrize("way", [None, *Way])
@pytest.mark.parametrize("payload", [None, (0, 600), (600, 2048), (1, 3)])
def test_blocks_go_to_the_arena_and_back_by_every_way(
    device: Device, way: Way | None, payload: tuple[int, int] | None
) -> None:
    spec = BlockSpec(2, 2, 16, 8, "float16")  # 2 KiB
    rng = np.random.default_rng(5)
    model = rng.integers(0, 256, (2, 2, 6, 2, 8, 16 * 2), dtype=np.uint8)  # layer, part, block, HND
    memory = device.allocate(model.nbytes)
    device.write(memory.address, model.ravel())
    half = model.nbytes // 2
    layers = [
        View(memory.address + i * half, (2, 6, 2, 8, 16), "<f2") for i in range(spec.num_layers)
    ]
    blocks = DeviceBlocks.paged(device, "vllm_hnd", layers, spec)
    assert blocks.block_bytes == 2048
    canonical = model.transpose(2, 0, 1, 4, 3, 5).reshape(6, 2048).copy()
    arena = host_pages(8)
    host = HostRegistration(device, arena, chunk_bytes=3 * PAGE)  # blocks span two chunks
    copies = ArenaCopies(device, 2 * 2 * 2064)  # two blocks at a time
    stream = device.new_stream()
    ids = np.array([4, 0, 5, 1, 2])
    offsets = 100 + 3 * 2048 * np.arange(5)
    begin, end = payload or (0, 2048)
    want = arena.copy()
    for i, offset in zip(ids, offsets, strict=True):
        want[offset + begin : offset + end] = canonical[i, begin:end]
    addresses = u64(arena.ctypes.data + offsets)
    copies.to_host(blocks, ids, host, addresses, stream, payload=payload, way=way)
    finish(device.record(stream))
    assert np.array_equal(arena, want)

    arena[:] = rng.integers(0, 256, arena.size, dtype=np.uint8)
    for i, offset in zip(ids, offsets, strict=True):
        canonical[i, begin:end] = arena[offset + begin : offset + end]
    copies.from_host(blocks, ids, host, addresses, stream, payload=payload, way=way)
    finish(device.record(stream))
    got = device.read(memory.address, model.nbytes).reshape(model.shape)
    assert np.array_equal(got.transpose(2, 0, 1, 4, 3, 5).reshape(6, 2048), canonical)
    with pytest.raises(ConfigError, match="not all within"):
        copies.to_host(blocks, [0], host, u64([arena.ctypes.data - 1]), stream)
    host.close()
    copies.close()
    blocks.close()
    memory.close()
    device.close_stream(stream)


def test_a_shared_memfd_is_reached_by_two_mappings(device: Device) -> None:
    """As the arena: one process's, and another's of the same file, here in one."""
    shared = SharedMemory(4 * PAGE)
    registrations = Registrations(device)
    host = registrations.of(shared.array)
    assert registrations.of(shared.array) is host
    memory, stream = device.allocate(4 * PAGE), device.new_stream()
    device.write(memory.address, np.full(4 * PAGE, 9, np.uint8))
    device.copy(u64([shared.address]), u64([memory.address]), u64([4 * PAGE]), stream)
    finish(device.record(stream))
    assert (shared.array == 9).all()
    registrations.close()
    memory.close()
    device.close_stream(stream)
    shared.close()


def test_wrong_memory_is_refused(device: Device) -> None:
    with pytest.raises(ConfigError, match="contiguous"):
        HostRegistration(device, host_pages(2)[::2])
    with pytest.raises(ConfigError, match="no memory of a GPU"):
        DeviceBlocks.contiguous(device, 5)
    with pytest.raises(ConfigError, match="in host memory"):
        DeviceBlocks.contiguous(device, np.zeros((2, 16), np.uint8))
    spec = BlockSpec(1, 1, 16, 1, "uint8")
    for layout in ("strided", "_per_layer", "none"):
        with pytest.raises(ConfigError, match=f"'{layout}' is none"):
            DeviceBlocks.paged(device, layout, [], spec)


# --- what only a driver does


def test_long_memory_is_registered_in_chunks(fake: FakeCuda) -> None:
    device = fake.device()
    host = host_pages(10)
    registered = HostRegistration(device, host, chunk_bytes=3 * PAGE)
    assert fake.live(REGISTERED) == 4
    registered.close()
    assert fake.live(REGISTERED) == 0
    fake.inject("cuMemHostRegister", 2, after=2)
    with pytest.raises(GpuError, match=r"chunk 2.*OUT_OF_MEMORY"):
        HostRegistration(device, host, chunk_bytes=3 * PAGE)
    assert fake.live(REGISTERED) == 0, "all or nothing"
    device.close()


def test_memory_that_is_mapped_read_only_is_registered_so(fake: FakeCuda) -> None:
    device = fake.device()
    shared = SharedMemory(PAGE)
    mapped = mmap.mmap(shared.fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
    array = np.frombuffer(mapped, np.uint8)
    assert not array.flags.writeable
    registered = HostRegistration(device, array)
    assert registered.read_only
    blocks = DeviceBlocks.contiguous(device, device.allocate(PAGE))
    with pytest.raises(ConfigError, match="read-only"):
        ArenaCopies(device).to_host(blocks, [0], registered, u64([array.ctypes.data]), 0)
    registered.close()
    with pytest.raises(GpuError):
        device.register(array.ctypes.data, PAGE, read_only=False)
    del array, registered
    mapped.close()
    shared.close()


@pytest.mark.parametrize(
    ("has_batch", "stream", "size", "call"),
    [
        (True, None, 64, "cuMemcpyBatchAsync"),
        (True, 0, 64, "cuLaunchKernel"),
        (False, None, 64, "cuLaunchKernel"),
        (False, None, 1 << 18, "cuMemcpyAsync"),
    ],
)
def test_pieces_are_copied_by_what_the_driver_has(
    fake: FakeCuda, has_batch: bool, stream: int | None, size: int, call: str
) -> None:
    """Batches where there are any and the stream takes them; else small pieces by a kernel."""
    fake.set_batch(has_batch)
    device = fake.device()
    on = device.new_stream() if stream is None else stream
    count = 12
    source, target = device.allocate(count * size), device.allocate(count * size)
    data = np.random.default_rng(1).integers(0, 256, count * size, dtype=np.uint8)
    device.write(source.address, data)
    order = np.random.default_rng(2).permutation(count)
    steps = size * np.arange(count)
    before = fake.calls(call)
    device.copy(
        u64(target.address + steps), u64(source.address + size * order), u64([size] * count), on
    )
    finish(device.record(on))
    assert fake.calls(call) > before
    want = data.reshape(count, -1)[order].ravel()
    assert np.array_equal(device.read(target.address, count * size), want)


def test_a_device_gives_all_back(fake: FakeCuda) -> None:
    device = fake.device()
    memory, stream = device.allocate(PAGE), device.new_stream()
    blocks = DeviceBlocks.contiguous(device, View(memory.address, (16, 256)))
    device.gather(blocks.prepared, np.array([1]), u64([memory.address]), stream)
    finish(device.record(stream))
    blocks.close()
    memory.close()
    device.close_stream(stream)
    device.close()
    device.close()
    left = {what: fake.live(what) for what in (ALLOCATIONS, EVENTS, PINNED, STREAMS)}
    assert not any(left.values()), left


def test_a_deadline_ends_a_wait() -> None:
    device = HostDevice(late=True)
    stream = device.new_stream()
    never = HostDevice(late=True)
    device.wait_event(stream, never.record(0))
    assert not wait_for(device.record(stream), 0.05)


def test_what_is_missing_is_named(fake: FakeCuda, tmp_path: object) -> None:
    has, why = available(f"{tmp_path}/none.so")
    assert not has
    assert "no CUDA driver" in why
    fake.inject("cuInit", 100)
    with pytest.raises(GpuError, match="cuInit"):
        fake.driver()
    with pytest.raises(GpuError, match="cuDeviceGet"):
        CudaDevice(7, driver=fake.driver())
