"""Proves that checksums and copies are exact.

XXH3 against PyPI's xxhash (the reference implementation) over all length classes, alignments and
instruction sets; gather and scatter against numpy indexing of the same memory for every layout;
argument errors; several threads; a child of fork().
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvstore import _native
from kvstore.block import BlockSpec
from kvstore.errors import ConfigError
from kvstore.layout import AxisTensor, ContiguousBlocks, PagedBuffers
from tests.layout_support import CASES, LAYOUTS, SHAPES, UINTS, Array, Layout, pool_of, spec_of

BEST_LEVEL = _native._simd_level()
LEVELS = range(BEST_LEVEL + 1)
PAD = 0xA5


@pytest.fixture(autouse=True)
def _restore_level() -> Iterator[None]:
    yield
    _native._force_simd_level(BEST_LEVEL)


def random_bytes(n: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8)


def expected_hash(data: Array) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(data).tobytes())


NOISE = random_bytes(1 << 16, 1)
LENGTHS = st.one_of(
    st.integers(0, 260),
    st.integers(241, 5000),
    st.sampled_from([1023, 1024, 1025, 1087, 1088, 1089, 2047, 2048, 2049, 16384, 60000]),
)


@given(LENGTHS, st.integers(0, 200), st.sampled_from(list(LEVELS)))
@settings(max_examples=400, deadline=None)
def test_checksum_equals_the_reference_implementation(n: int, at: int, level: int) -> None:
    assert _native._force_simd_level(level)
    piece = NOISE[at : at + n]
    assert _native.xxh3(piece) == expected_hash(piece)
    assert _native.checksum(NOISE.ctypes.data + at, n) == expected_hash(piece)


@pytest.mark.parametrize("level", LEVELS)
def test_checksum_of_every_short_length(level: int) -> None:
    assert _native._force_simd_level(level)
    for n in range(1300):
        assert _native.xxh3(NOISE[:n]) == expected_hash(NOISE[:n]), n


@given(LENGTHS, st.integers(0, 130), st.integers(0, 130), st.sampled_from(list(LEVELS)))
@settings(max_examples=300, deadline=None)
def test_copy_with_checksum_copies_exactly(n: int, at: int, to_at: int, level: int) -> None:
    assert _native._force_simd_level(level)
    target = np.full(n + 256, PAD, np.uint8)
    value = _native.copy_with_checksum(target.ctypes.data + to_at, NOISE.ctypes.data + at, n)
    assert value == expected_hash(NOISE[at : at + n])
    assert np.array_equal(target[to_at : to_at + n], NOISE[at : at + n])
    assert (target[:to_at] == PAD).all()
    assert (target[to_at + n :] == PAD).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("to_at", [0, 1, 16, 63])
@pytest.mark.parametrize("extra", [0, 1, 63, 100])
def test_big_copies_through_streaming_stores_are_exact(level: int, to_at: int, extra: int) -> None:
    assert _native._force_simd_level(level)
    n = (1 << 20) + extra
    source = random_bytes(n, extra)
    target = np.full(n + 256, PAD, np.uint8)
    value = _native.copy_with_checksum(target.ctypes.data + to_at, source.ctypes.data, n)
    assert value == expected_hash(source)
    assert np.array_equal(target[to_at : to_at + n], source)
    assert (target[:to_at] == PAD).all()
    assert (target[to_at + n :] == PAD).all()


def check_layout(layout: Layout, spec: BlockSpec, seed: int, threads: int, gap: int) -> None:
    """Gathers random blocks, scatters others, and compares all memory with the model's."""
    rng = np.random.default_rng(seed)
    blocks = int(rng.integers(1, 7))
    kind = UINTS[spec.dtype_bytes]

    def new(*shape: int) -> Array:
        return rng.integers(0, np.iinfo(kind).max, shape, dtype=kind, endpoint=True)

    buffers, model, tensors = layout(spec, blocks, new)
    assert buffers.num_blocks == blocks
    assert buffers.block_bytes == spec.block_bytes
    ids = buffers.validate_ids(rng.permutation(blocks)[: int(rng.integers(1, blocks + 1))])

    slot = spec.block_bytes + gap
    arena = np.full(len(ids) * slot + 64, PAD, np.uint8)
    start = int(rng.integers(0, 64))
    addrs = (arena.ctypes.data + start + slot * np.arange(len(ids))).astype(np.uint64)
    sums = np.zeros(len(ids), np.uint64)
    _native.gather(buffers.plan, ids, addrs, sums, threads)
    expected = np.full_like(arena, PAD)
    for i, block in enumerate(ids):
        data = np.ascontiguousarray(model[block]).view(np.uint8).ravel()
        expected[start + i * slot :][: spec.block_bytes] = data
        assert sums[i] == expected_hash(data)
    assert np.array_equal(arena, expected)
    again = np.zeros_like(sums)
    _native.checksum_blocks(addrs, spec.block_bytes, again, threads)
    assert np.array_equal(again, sums)

    arena[:] = rng.integers(0, 256, arena.size, dtype=np.uint8)
    before = [tensor.copy() for tensor in tensors]
    _native.scatter(buffers.plan, ids, addrs, sums, threads)
    got = [tensor.copy() for tensor in tensors]
    for tensor, old in zip(tensors, before, strict=True):
        tensor[...] = old
    for i, block in enumerate(ids):
        data = arena[start + i * slot :][: spec.block_bytes].copy()
        assert sums[i] == expected_hash(data)
        model[block] = data.view(kind).reshape(np.asarray(model[block]).shape)
    for tensor, copied in zip(tensors, got, strict=True):
        assert np.array_equal(tensor, copied)


@pytest.mark.parametrize(("name", "kind", "layout"), CASES, ids=[case[0] for case in CASES])
@given(
    st.sampled_from(SHAPES),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 1 << 30),
    st.sampled_from(list(LEVELS)),
    st.sampled_from([0, 1, 64]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example((2, 3, 64, 16), 2, 0, BEST_LEVEL, 0)
def test_gather_and_scatter_equal_indexing(
    name: str,
    kind: str,
    layout: Layout,
    shape: tuple[int, int, int, int],
    itemsize: int,
    seed: int,
    level: int,
    gap: int,
) -> None:
    assert _native._force_simd_level(level)
    check_layout(layout, spec_of(shape, itemsize, kind), seed, 1, gap)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("name", ["reference", "vllm_nhd", "vllm_hnd", "sglang_page_head"])
def test_big_batches_equal_indexing_on_any_number_of_threads(
    name: str, threads: int, level: int
) -> None:
    assert _native._force_simd_level(level)
    spec = BlockSpec(8, 4, 128, 32, "float16")  # 512 KiB: streaming stores and helper threads
    for seed in range(3):
        check_layout(LAYOUTS[name], spec, seed, threads, 0 if seed else 7)


def test_random_runs_in_any_order_make_the_same_plan() -> None:
    rng = np.random.default_rng(5)
    pool = random_bytes(64 * 40).reshape(4, 640)
    order = rng.permutation(10)
    rows = [
        (pool.ctypes.data + 64 * int(e), 640, 64, 64 * i, 64, 1, 64) for i, e in enumerate(order)
    ]
    plan = _native.CopyPlan(np.array(rows)[rng.permutation(10)], 640, 4)
    out = np.zeros((4, 640), np.uint8)
    _native.gather(plan, np.arange(4), address_rows(out))
    assert np.array_equal(out, pool.reshape(4, 10, 64)[:, order].reshape(4, 640))


def address_rows(array: Array) -> npt.NDArray[np.uint64]:
    rows = np.arange(len(array), dtype=np.uint64)
    return rows * np.uint64(array.strides[0]) + np.uint64(array.ctypes.data)


@given(st.sampled_from(["reference", "vllm_nhd", "vllm_hnd", "sglang_page_head"]), st.data())
@settings(max_examples=80, deadline=None)
def test_ranges_touch_only_their_bytes(name: str, data: st.DataObject) -> None:
    spec = spec_of(data.draw(st.sampled_from(SHAPES)), 2, "kv")
    rng = np.random.default_rng(3)

    def new(*shape: int) -> Array:
        return rng.integers(0, 1 << 16, shape, dtype=np.uint16)

    buffers, _, tensors = LAYOUTS[name](spec, 3, new)
    begin = data.draw(st.integers(0, spec.block_bytes))
    end = data.draw(st.integers(begin, spec.block_bytes))
    ids = np.array([2, 0])
    whole = np.zeros((2, spec.block_bytes), np.uint8)
    _native.gather(buffers.plan, ids, address_rows(whole))
    part = np.full_like(whole, PAD)
    _native.gather_range(buffers.plan, ids, address_rows(part), begin, end)
    assert np.array_equal(part[:, begin:end], whole[:, begin:end])
    assert (part[:, :begin] == PAD).all()
    assert (part[:, end:] == PAD).all()

    old = [tensor.copy() for tensor in tensors]
    noise = rng.integers(0, 256, whole.shape, dtype=np.uint8)
    _native.scatter_range(buffers.plan, ids, address_rows(noise), begin, end)
    _native.gather(buffers.plan, ids, address_rows(part))
    assert np.array_equal(part[:, begin:end], noise[:, begin:end])
    assert np.array_equal(part[:, :begin], whole[:, :begin])
    assert np.array_equal(part[:, end:], whole[:, end:])
    _native.scatter(buffers.plan, ids, address_rows(whole))
    for tensor, before in zip(tensors, old, strict=True):
        assert np.array_equal(tensor, before)


def test_layer_ranges_make_up_the_block() -> None:
    spec = BlockSpec(4, 2, 16, 8, "float16")
    pool = random_bytes(3 * spec.block_bytes).view(np.uint16).reshape(3, 4, 2, 8, 2, 16)
    buffers = PagedBuffers.reference(pool, spec)
    ids = np.arange(3)
    out = np.zeros((3, spec.block_bytes), np.uint8)
    for layer in range(4):
        _native.gather_range(buffers.plan, ids, address_rows(out), *buffers.layer_range(layer))
    assert np.array_equal(out, pool.reshape(3, -1).view(np.uint8))
    with pytest.raises(ConfigError, match="layers 3 to 5"):
        buffers.layer_range(3, 2)


def test_padding_between_blocks_is_left_alone() -> None:
    memory = np.full((5, 100), PAD, np.uint8)
    rows = memory[:, 10:74]
    buffers = ContiguousBlocks(rows)
    data = random_bytes(128).reshape(2, 64)
    _native.scatter(buffers.plan, np.array([4, 1]), address_rows(data))
    assert np.array_equal(rows[[4, 1]], data)
    memory[:, 10:74] = PAD
    assert (memory == PAD).all()


def test_page_major_layouts_are_one_piece() -> None:
    spec = BlockSpec(4, 2, 16, 8, "float16")
    shape = (3, 4, 2, 8, 2, 16)
    assert PagedBuffers.reference(np.zeros(shape, np.float16), spec).plan.num_runs == 1
    layers = [np.zeros((2, 3, 8, 2, 16), np.float16) for _ in range(4)]
    assert (PagedBuffers.vllm_nhd(layers, spec).plan.runs[:, 6] == 8 * 2 * 16 * 2).all()


class TestArguments:
    """Each wrong argument is its own error, and nothing is copied."""

    def setup_method(self) -> None:
        self.pool = random_bytes(4 * 64).reshape(4, 64)
        self.plan = ContiguousBlocks(self.pool).plan
        self.out = np.zeros((2, 64), np.uint8)
        self.addrs = address_rows(self.out)

    def teardown_method(self) -> None:
        assert not self.out.any()

    @pytest.mark.parametrize("call", [_native.gather, _native.scatter])
    @pytest.mark.parametrize("bad", [-1, 4, 1 << 40])
    def test_block_id_out_of_range_is_named(self, call: Callable[..., None], bad: int) -> None:
        with pytest.raises(IndexError, match=f"block id {bad} "):
            call(self.plan, np.array([0, bad]), self.addrs)

    @pytest.mark.parametrize("call", [_native.gather, _native.scatter])
    def test_wrong_arrays_are_named(self, call: Callable[..., None]) -> None:
        ids = np.array([0, 1])
        with pytest.raises(ValueError, match="block_ids has 1 elements and addrs 2"):
            call(self.plan, ids[:1], self.addrs)
        with pytest.raises(TypeError, match="block_ids must be an array of int64, not of int32"):
            call(self.plan, ids.astype(np.int32), self.addrs)
        with pytest.raises(TypeError, match="addrs must be a numpy array"):
            call(self.plan, ids, [1, 2])
        with pytest.raises(ValueError, match="addrs must be a contiguous array"):
            call(self.plan, ids, np.zeros(4, np.uint64)[::2])
        with pytest.raises(ValueError, match="checksums has 3 elements"):
            call(self.plan, ids, self.addrs, np.zeros(3, np.uint64))
        with pytest.raises(ValueError, match="threads"):
            call(self.plan, ids, self.addrs, None, 0)
        with pytest.raises(ValueError, match="null"):
            call(self.plan, ids, np.zeros(2, np.uint64))
        frozen = np.zeros(2, np.uint64)
        frozen.flags.writeable = False
        with pytest.raises(ValueError, match="checksums must be writable"):
            call(self.plan, ids, self.addrs, frozen)

    def test_overlapping_destinations_are_refused(self) -> None:
        with pytest.raises(ValueError, match="overlapping destination, block 3"):
            _native.scatter(self.plan, np.array([3, 3]), self.addrs)
        with pytest.raises(ValueError, match="canonical blocks overlap"):
            _native.gather(
                self.plan, np.array([3, 2]), self.addrs[0] + np.array([63, 0], np.uint64)
            )
        with pytest.raises(ValueError, match="overlaps the engine"):
            _native.gather(self.plan, np.array([0]), address_rows(self.pool)[2:3] + np.uint64(63))

    def test_ranges_outside_of_the_block_are_refused(self) -> None:
        for begin, end in ((2, 1), (0, 65)):
            with pytest.raises(ValueError, match="offset_begin"):
                _native.gather_range(self.plan, np.array([0]), self.addrs[:1], begin, end)

    def test_read_only_engine_memory_is_never_written(self) -> None:
        self.pool.flags.writeable = False
        buffers = ContiguousBlocks(self.pool)
        assert not buffers.writable
        with pytest.raises(ConfigError, match="read-only"):
            buffers.require_writable()
        with pytest.raises(ValueError, match="read-only"):
            _native.scatter(buffers.plan, np.array([0]), self.addrs[:1])

    def test_empty_batch_is_nothing(self) -> None:
        _native.gather(self.plan, np.array([], np.int64), np.array([], np.uint64))


BASE = np.zeros(4096, np.uint8)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 64, 0, 0, 0, 1, 64)], "in no run"),
        ([(0, 128, 0, 64, 0, 1, 64)], r"\[0, 64\) are in no run"),
        ([(0, 128, 0, 0, 0, 1, 80), (80, 128, 0, 64, 0, 1, 64)], "in two pieces"),
        ([(0, 256, 64, 0, 32, 4, 32), (32, 256, 64, 64, 32, 2, 32)], "in two pieces"),
        ([(0, 128, 0, 0, 0, 1, 64), (32, 128, 0, 64, 0, 1, 64)], "overlap in engine memory"),
        ([(0, 64, 0, 0, 0, 1, 128)], "neighbouring blocks overlap"),
        ([(0, 128, 0, 0, 0, 1, 129)], "past block_bytes"),
        ([(0, 128, 0, 0, 0, 0, 128)], "count and bytes"),
        ([(0, 128, 0, 0, 0, 1, 0)], "count and bytes"),
        ([(0, 128, 0, -1, 0, 1, 128)], "must not be negative"),
        ([(0, 1 << 62, 0, 0, 0, 1, 128)], "address space"),
        ([(0, -(1 << 62), 0, 0, 0, 1, 128)], "address space"),
    ],
)
def test_impossible_plans_are_refused(rows: list[tuple[int, ...]], message: str) -> None:
    runs = np.array([(BASE.ctypes.data + row[0], *row[1:]) for row in rows])
    with pytest.raises(ValueError, match=message):
        _native.CopyPlan(runs, 128, 4)


def test_runs_array_is_checked() -> None:
    with pytest.raises(ValueError, match="7 columns"):
        _native.CopyPlan(np.zeros((1, 6), np.int64), 128, 4)
    with pytest.raises(TypeError, match="runs must be an array of int64"):
        _native.CopyPlan(np.zeros((1, 7)), 128, 4)  # type: ignore[arg-type]
    for block_bytes, num_blocks in ((0, 1), (-1, 1), (64, 0)):
        with pytest.raises(ValueError, match="must be positive"):
            _native.CopyPlan(np.zeros((0, 7), np.int64), block_bytes, num_blocks)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_child_of_fork_copies_with_threads_of_its_own() -> None:
    pool = random_bytes(8 << 20).reshape(8, 1 << 20)
    plan = ContiguousBlocks(pool).plan
    out = np.zeros_like(pool)
    _native.gather(plan, np.arange(8), address_rows(out), None, 4)  # the parent's helpers start
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs dies, and so fails the test
        out[:] = 0
        _native.gather(plan, np.arange(8), address_rows(out), None, 4)
        os._exit(0 if np.array_equal(out, pool) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(out, pool)


@given(st.permutations(["block", "layer", "part", "token", "head", "dim"]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_order_of_axes_can_be_described(order: list[str], seed: int) -> None:
    spec = BlockSpec(2, 3, 4, 2, "float16")
    names = dict(zip("BLPTHD", ("block", "layer", "part", "token", "head", "dim"), strict=True))
    letters = "".join(next(k for k, v in names.items() if v == axis) for axis in order)

    def make(pool: Array, spec: BlockSpec) -> PagedBuffers:
        return PagedBuffers.strided([AxisTensor(pool, tuple(order))], spec)

    check_layout(pool_of(letters, make), spec, seed, 1, 0)
