"""Proves that the kernels of csrc/cuda copy every byte of every layout to its place, and touch no
other: against numpy indexing of a copy of the same memory, bit for bit.

On the CPU the kernels run as they are, compiled by g++, every thread of every block, called through
the driver's ABI by the code that calls a GPU's. With `-m gpu` the same tests run on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvstore import BlockSpec, PieceBuffers
from kvstore.gpu import CudaDevice, Device, DeviceBlocks
from kvstore.gpu.blocks import run_table
from kvstore.gpu.device import word_bytes
from kvstore.gpu.launches import THREADS, WORDS, launch_shape
from tests.gpu.fake_cuda import FakeCuda
from tests.gpu.support import Shadow, View, finish, u64
from tests.layout_support import CASES, LAYOUTS, SHAPES, UINTS, Layout, spec_of


@pytest.fixture(params=["fake", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest) -> Iterator[CudaDevice]:
    if request.param == "gpu":
        yield request.getfixturevalue("gpu")
    else:
        fake: FakeCuda = request.getfixturevalue("fake")
        fake.set_late(True)
        device = fake.device()
        yield device
        device.close()


def check_layout(
    device: Device, layout: Layout, spec: BlockSpec, seed: int, gap: int, start: int
) -> None:
    """Gather random blocks, scatter others, in whole and by layers; compare all memory."""
    rng = np.random.default_rng(seed)
    blocks = int(rng.integers(1, 7))
    kind = UINTS[spec.dtype_bytes]
    room = 2 * blocks * spec.block_bytes + 64 * (2 * spec.num_layers + 2) * (gap + 8)
    shadow = Shadow(room, seed)
    buffers, model, _ = layout(spec, blocks, partial(shadow.new, kind, gap))
    ids = buffers.validate_ids(rng.permutation(blocks)[: int(rng.integers(1, blocks + 1))])
    slot = spec.block_bytes + gap
    stream = device.new_stream()
    engine = device.allocate(room)
    slots = device.allocate(len(ids) * slot + 64)
    device.write(engine.address, shadow.bytes)
    plan = shadow.prepare(device, buffers, engine.address)
    addresses = u64(slots.address + start + slot * np.arange(len(ids)))

    arena = rng.integers(0, 256, slots.num_bytes, dtype=np.uint8)
    device.write(slots.address, arena)
    device.gather(plan, ids, addresses, stream)
    finish(device.record(stream))
    for i, block in enumerate(ids):
        data = np.ascontiguousarray(model[block]).view(np.uint8).ravel()
        arena[start + i * slot :][: spec.block_bytes] = data
    assert np.array_equal(device.read(slots.address, len(arena)), arena)
    assert np.array_equal(device.read(engine.address, room), shadow.bytes)

    arena = rng.integers(0, 256, slots.num_bytes, dtype=np.uint8)
    device.write(slots.address, arena)
    first, end = sorted(rng.integers(0, spec.num_layers + 1, 2).tolist())
    payload = buffers.layer_range(first, end - first)
    for part in ((0, payload[0]), payload, (payload[1], spec.block_bytes)):
        device.scatter(plan, ids, addresses, stream, part)
    finish(device.record(stream))
    for i, block in enumerate(ids):
        data = arena[start + i * slot :][: spec.block_bytes].copy()
        model[block] = data.view(kind).reshape(np.asarray(model[block]).shape)
    assert np.array_equal(device.read(engine.address, room), shadow.bytes)
    assert np.array_equal(device.read(slots.address, len(arena)), arena)
    for memory in (engine, slots, plan):
        memory.close()
    device.close_stream(stream)


@pytest.mark.parametrize(("name", "kind", "layout"), CASES, ids=[case[0] for case in CASES])
@given(
    st.sampled_from(SHAPES),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 1 << 30),
    st.tuples(st.sampled_from([0, 1, 4, 64]), st.sampled_from([0, 1, 2, 8, 16])),
)
@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@example((2, 3, 64, 16), 2, 0, (0, 0))
def test_every_layout_is_copied_exactly(
    cuda: CudaDevice,
    name: str,
    kind: str,
    layout: Layout,
    shape: tuple[int, int, int, int],
    itemsize: int,
    seed: int,
    apart: tuple[int, int],
) -> None:
    check_layout(cuda, layout, spec_of(shape, itemsize, kind), seed, *apart)


@pytest.mark.parametrize("name", ["reference", "vllm_nhd", "vllm_hnd", "sglang_page_head"])
def test_blocks_of_many_tiles_are_copied_exactly(cuda: CudaDevice, name: str) -> None:
    spec = BlockSpec(4, 2, 128, 16, "float16")  # 64 KiB
    for seed, gap in enumerate((0, 16, 3)):
        check_layout(cuda, LAYOUTS[name], spec, seed, gap, gap)


def test_scattered_blocks_are_copied_exactly(cuda: CudaDevice) -> None:
    rng = np.random.default_rng(3)
    for sizes, step in (((48, 16, 32), 16), ((7, 9, 3, 1), 1)):
        engine = cuda.allocate(4096)
        out = cuda.allocate(8 * sum(sizes))
        stream = cuda.new_stream()
        data = rng.integers(0, 256, 4096, dtype=np.uint8)
        cuda.write(engine.address, data)
        # Pieces at places of their own, none overlapping.
        places = step * rng.permutation(4096 // 64)[: 8 * len(sizes)].reshape(8, -1) * (64 // step)
        buffers = PieceBuffers(engine.address + places, np.array(sizes))
        plan = cuda.prepare(run_table(buffers.plan))
        ids = np.array([5, 0, 7, 2])
        addresses = u64(out.address + sum(sizes) * np.arange(4))
        cuda.gather(plan, ids, addresses, stream)
        finish(cuda.record(stream))
        expected = [data[p : p + n] for b in ids for p, n in zip(places[b], sizes, strict=True)]
        assert np.array_equal(cuda.read(out.address, 4 * sum(sizes)), np.concatenate(expected))
        for memory in (engine, out, plan):
            memory.close()
        cuda.close_stream(stream)


def test_ends_near_those_of_tiles_are_exact(cuda: CudaDevice) -> None:
    """A tile of single bytes is 1,024 of them."""
    size, tile = 2100, THREADS * WORDS
    rng = np.random.default_rng(4)
    data = rng.integers(0, 256, 2 * size, dtype=np.uint8)
    source, target = cuda.allocate(2 * size), cuda.allocate(2 * size + 1)
    cuda.write(source.address, data)
    blocks = DeviceBlocks.contiguous(cuda, View(source.address, (2, size)))
    stream = cuda.new_stream()
    addresses = u64(target.address + 1 + size * np.arange(2))
    for end in (*range(tile - 20, tile + 20), *range(2 * tile - 20, 2 * tile + 20)):
        want = rng.integers(0, 256, 2 * size + 1, dtype=np.uint8)
        cuda.write(target.address, want)
        cuda.gather(blocks.prepared, np.array([1, 0]), addresses, stream, (0, end))
        finish(cuda.record(stream))
        want[1 : 1 + end], want[1 + size : 1 + size + end] = data[size : size + end], data[:end]
        assert np.array_equal(cuda.read(target.address, 2 * size + 1), want), end
    for memory in (blocks, source, target):
        memory.close()
    cuda.close_stream(stream)


def test_words_are_as_wide_as_everything_allows() -> None:
    assert word_bytes(32, 4096) == 16
    assert word_bytes(8, -16) == 8
    assert word_bytes(0, 6) == 2
    assert word_bytes(3) == 1
    shape = launch_shape(16, u64([4096, 8192]), 0, 2 << 20)
    assert shape is not None
    assert (shape.width, shape.tiles) == (16, (2 << 20) // (16 * THREADS * WORDS))
    odd = launch_shape(16, u64([4096, 8196]), 0, 40)
    assert odd is not None
    assert (odd.width, odd.tiles) == (4, 1)
    assert launch_shape(16, u64([4096]), 8, 8) is None
    assert launch_shape(16, u64([]), 0, 8) is None


@pytest.mark.parametrize(
    ("layout", "width"),
    [("vllm_nhd", 16), ("vllm_hnd", 16), ("vllm_views_BLHNC", 16), ("sglang_pools", 16)],
)
def test_layouts_of_real_models_are_copied_in_words_of_16_bytes(layout: str, width: int) -> None:
    spec = BlockSpec(2, 8, 128, 16, "bfloat16")
    shadow = Shadow(1 << 20, 0)

    def new(*shape: int) -> object:
        return shadow.new(np.uint16, 0, *shape)

    buffers, _, _ = LAYOUTS[layout](spec, 4, new)  # type: ignore[arg-type]
    assert run_table(buffers.plan).alignment == width
