"""PieceBuffers against numpy.

Proved by Hypothesis: whatever the sizes of the pieces and wherever they lie, adjacent, in order, at
equal distances, backwards or anywhere, a gather is the concatenation of the pieces, a scatter its
inverse, whole, by ranges, on several threads and through a store; all other memory is left alone.
What cannot be right is refused by name.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import kvstore
from kvstore import ConfigError, PieceBuffers, _native

Bytes = npt.NDArray[np.uint8]
Addresses = npt.NDArray[np.uint64]

SIZES = st.one_of(st.integers(1, 70), st.sampled_from([64, 128, 192, 256, 1024, 1000, 4096]))


class Memory:
    """Noise, and where pieces lie in it."""

    def __init__(self, offsets: npt.NDArray[np.int64], sizes: list[int], seed: int) -> None:
        self.offsets = offsets
        self.sizes = sizes
        end = int((offsets + np.array(sizes)).max()) if offsets.size else 1
        self.bytes = np.random.default_rng(seed).integers(0, 256, end + 64, dtype=np.uint8)

    @property
    def addresses(self) -> Addresses:
        return (self.offsets + self.bytes.ctypes.data).astype(np.uint64)

    def buffers(self, writable: bool = True) -> PieceBuffers:
        return PieceBuffers(self.addresses, self.sizes, self.bytes, writable)

    def block(self, block: int) -> Bytes:
        pairs = zip(self.offsets[block].tolist(), self.sizes, strict=True)
        return np.concatenate([self.bytes[at : at + size] for at, size in pairs])

    def set_block(self, block: int, data: Bytes) -> None:
        begin = 0
        for at, size in zip(self.offsets[block].tolist(), self.sizes, strict=True):
            self.bytes[at : at + size] = data[begin : begin + size]
            begin += size


@st.composite
def memories(draw: st.DrawFn) -> Memory:
    num_blocks = draw(st.integers(1, 5))
    if draw(st.booleans()):
        sizes = [draw(SIZES)] * draw(st.integers(1, 12))
    else:
        sizes = draw(st.lists(SIZES, min_size=1, max_size=8))
    seed = draw(st.integers(0, 1 << 30))
    rng = np.random.default_rng(seed)
    shape = (num_blocks, len(sizes))
    spans = np.broadcast_to(np.array(sizes, np.int64), shape)
    how = draw(st.sampled_from(["rows", "columns", "backwards", "anywhere"]))
    gap = draw(st.sampled_from([0, 1, 64]))
    places = np.arange(spans.size).reshape(shape)
    order = {
        "rows": places.ravel(),
        "columns": places.T.ravel(),
        "backwards": places.ravel()[::-1],
        "anywhere": rng.permutation(spans.size),
    }[how]
    ends = np.cumsum(spans.ravel()[order] + gap)
    offsets = np.empty(spans.size, np.int64)
    offsets[order] = ends - spans.ravel()[order]
    return Memory(offsets.reshape(shape), sizes, seed)


def rows_of(arena: Bytes) -> Addresses:
    rows = np.arange(len(arena), dtype=np.uint64) * np.uint64(arena.strides[0])
    return rows + np.uint64(arena.ctypes.data)


@given(memories(), st.sampled_from([1, 3]), st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_are_gathered_and_scattered_as_numpy_does(
    memory: Memory, threads: int, data: st.DataObject
) -> None:
    buffers = memory.buffers()
    size = sum(memory.sizes)
    assert (buffers.block_bytes, buffers.num_blocks) == (size, len(memory.offsets))
    ids = np.array(data.draw(st.permutations(range(buffers.num_blocks))))
    expected = np.stack([memory.block(int(i)) for i in ids])
    arena, sums = np.zeros((len(ids), size), np.uint8), np.zeros(len(ids), np.uint64)
    _native.gather(buffers.plan, ids, rows_of(arena), sums, threads)
    assert np.array_equal(arena, expected)
    assert sums.tolist() == [xxhash.xxh3_64_intdigest(row.tobytes()) for row in expected]

    arena[:] = np.random.default_rng(size).integers(0, 256, arena.shape, dtype=np.uint8)
    before = memory.bytes.copy()
    _native.scatter(buffers.plan, ids, rows_of(arena), sums, threads)
    got = memory.bytes.copy()
    memory.bytes[:] = before
    for i, row in zip(ids, arena, strict=True):
        memory.set_block(int(i), row)
    assert np.array_equal(got, memory.bytes)
    assert sums.tolist() == [xxhash.xxh3_64_intdigest(row.tobytes()) for row in arena]

    begin = data.draw(st.integers(0, size))
    end = data.draw(st.integers(begin, size))
    part = np.full_like(arena, 0xA5)
    _native.gather_range(buffers.plan, ids, rows_of(part), begin, end, threads)
    assert np.array_equal(part[:, begin:end], arena[:, begin:end])
    assert (np.delete(part, slice(begin, end), axis=1) == 0xA5).all()
    arena[:, begin:end] ^= 0xFF
    _native.scatter_range(buffers.plan, ids, rows_of(arena), begin, end, threads)
    for i, row in zip(ids, arena, strict=True):
        assert np.array_equal(memory.block(int(i)), row)


def test_big_batches_of_pieces_are_exact_on_threads() -> None:
    """Streaming stores and helpers: 16 blocks of 1 MiB in 2 and in 64 pieces, at random places."""
    rng = np.random.default_rng(3)
    for num_pieces in (2, 64):
        piece = (1 << 20) // num_pieces
        offsets = (rng.permutation(16 * num_pieces) * piece).reshape(16, num_pieces)
        memory = Memory(offsets, [piece] * num_pieces, num_pieces)
        arena, sums = np.zeros((16, 1 << 20), np.uint8), np.zeros(16, np.uint64)
        _native.gather(memory.buffers().plan, np.arange(16), rows_of(arena), sums, 4)
        for i in range(16):
            assert np.array_equal(arena[i], memory.block(i))
            assert int(sums[i]) == xxhash.xxh3_64_intdigest(arena[i].tobytes())
        expected = memory.bytes.copy()
        memory.bytes[: 16 << 20] = 0
        _native.scatter(memory.buffers().plan, np.arange(16), rows_of(arena), None, 4)
        assert np.array_equal(memory.bytes, expected)


def test_pieces_that_lie_alike_in_every_block_are_merged() -> None:
    base = np.zeros(1 << 16, np.uint8)
    at = base.ctypes.data
    pages = np.array([0, 5, 2])[:, None] * 512
    adjacent = PieceBuffers(at + pages + np.array([0, 64, 128]), [64, 64, 32], base)
    assert adjacent.plan.runs[:, 3:].tolist() == [[0, 160, 1, 160]]
    layers = PieceBuffers(at + pages + 4096 * np.arange(8), [256] * 8, base)
    assert layers.plan.runs[:, 2:].tolist() == [[4096, 0, 256, 8, 256]]
    mixed = PieceBuffers(at + np.array([[0, 64], [4096, 8192]]), [64, 64], base)
    assert mixed.plan.num_runs == 2


def test_a_store_takes_pieces_and_gives_them_back() -> None:
    memory = Memory(np.arange(24).reshape(4, 6) * 4096, [1000, 24, 512, 1, 63, 2496], 5)
    spec = kvstore.BlockSpec.of_bytes(4096)
    hashes = kvstore.hash_blocks(list(range(64)), 16)
    with kvstore.open(spec, cpu="1MiB", chunk="1MiB") as store:
        assert (
            store.put(hashes, memory.buffers(writable=False), [2, 0, 3, 1]).wait().num_stored == 4
        )
        expected = memory.bytes.copy()
        for i in range(4):
            memory.set_block(i, np.zeros(4096, np.uint8))
        assert store.load(hashes[:3], memory.buffers(), [2, 0, 3]).wait().num_blocks == 3
        assert store.load_each(hashes[3:], memory.buffers(), [1]).all()
        assert np.array_equal(memory.bytes, expected)
        with pytest.raises(ConfigError, match="read-only"):
            store.load(hashes, memory.buffers(writable=False))
        with pytest.raises(IndexError, match="block id 4"):
            store.load(hashes[:1], memory.buffers(), [4])


BASE = np.zeros(4096, np.uint8)
AT = BASE.ctypes.data


@pytest.mark.parametrize(
    ("addresses", "sizes", "message"),
    [
        ([[AT, 0]], [1, 1], "null address of block 0, piece 1"),
        (np.array([[AT], [1 << 63]], np.uint64), [64], "impossible address of block 1, piece 0"),
        ([[AT, AT + 64]], [64, 0], "piece 1 has 0 bytes"),
        ([[AT]], [1 << 32], "piece 0 has 4294967296 bytes"),
        ([[AT, AT + 63]], [64, 64], "overlap"),
        ([[AT], [AT + 1]], [64], "overlap"),
        ([[AT]], [64, 64], "1 pieces a block, sizes 2"),
        (np.zeros((0, 1), np.uint64), [64], "at least one block"),
        (np.zeros((1, 0), np.uint64), np.zeros(0, np.uint64), "at least one piece"),
        ([AT], [64], "2 dimensions"),
        ([[AT]], 64, "sizes: need 1 dimensions"),
        ([[float(AT)]], [64], "need integers"),
        ([[AT]], [-64], "sizes: -64 is negative"),
        ([[AT], [AT, AT]], [64], "addresses"),
        ("text", [64], "addresses: need integers"),
    ],
)
def test_impossible_pieces_are_refused(addresses: object, sizes: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PieceBuffers(addresses, sizes)


def test_what_is_only_read_may_lie_on_itself() -> None:
    buffers = PieceBuffers([[AT, AT + 32], [AT, AT]], [64, 64], BASE, writable=False)
    assert not buffers.writable
    out = np.ones((2, 128), np.uint8)
    _native.gather(buffers.plan, np.arange(2), rows_of(out))
    assert not out.any()
    with pytest.raises(ValueError, match="overlaps the engine"):
        _native.gather(buffers.plan, np.array([0]), np.array([AT + 90], np.uint64))
