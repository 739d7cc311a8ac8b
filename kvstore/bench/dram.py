"""Put and load in DRAM beside memcpy of the same bytes, one thread.

Engine blocks and arena are larger than any cache and are walked in circles, so that source and
target lines come from memory each time, as they do in an engine. All memory was touched before the
clock starts. The arena is full: a put evicts as many blocks as it stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import kvstore
from kvstore import _native
from kvstore.bench.report import Figure
from kvstore.bench.timing import Scale, Seconds, in_turn, median, speedup
from kvstore.block import BlockHashes, BlockSpec
from kvstore.layout import BlockBuffers, ContiguousBlocks, PagedBuffers
from kvstore.store import Store

Bytes = npt.NDArray[np.uint8]
MIB = 1 << 20
SPEC_1MIB = BlockSpec(num_layers=16, num_kv_heads=8, head_dim=128, block_tokens=16, dtype="float16")
SPEC_64KIB = BlockSpec(num_layers=1, num_kv_heads=8, head_dim=128, block_tokens=16, dtype="float16")
MEMCPY = "memcpy, one thread"


def contiguous(memory: Bytes, spec: BlockSpec) -> BlockBuffers:
    return ContiguousBlocks(memory.reshape(-1, spec.block_bytes))


def paged(memory: Bytes, spec: BlockSpec) -> BlockBuffers:
    """A tensor [2, blocks, tokens, heads, dim] for each layer, as in vLLM: pieces of 32 KiB."""
    shape = (spec.num_layers, 2, -1, spec.block_tokens, spec.num_kv_heads, spec.head_dim)
    return PagedBuffers.vllm_nhd(list(memory.view(np.float16).reshape(shape)), spec)


@dataclass
class Walk:
    """A store with its engine blocks, and as much plain memory for memcpy; goes round both."""

    store: Store
    source: Bytes
    target: Bytes
    plain: Bytes
    buffers: Callable[[Bytes, BlockSpec], BlockBuffers]
    batch: int

    def __post_init__(self) -> None:
        self.spec = self.store.namespace.spec
        self.block_bytes = self.spec.block_bytes
        self.from_engine = self.buffers(self.source, self.spec)
        self.to_engine = self.buffers(self.target, self.spec)
        self.engine_steps = self.source.size // (self.block_bytes * self.batch)
        self.arena_steps = self.plain.size // (self.block_bytes * self.batch)
        self.random = np.random.default_rng(1)
        self.chains: list[BlockHashes] = []
        self.ids = [
            np.arange(step * self.batch, (step + 1) * self.batch, dtype=np.int64)
            for step in range(self.engine_steps)
        ]
        engine = self.block_bytes * np.arange(self.engine_steps * self.batch, dtype=np.uint64)
        arena = self.block_bytes * np.arange(self.arena_steps * self.batch, dtype=np.uint64)
        self.source_at = (engine + np.uint64(self.source.ctypes.data)).reshape(-1, self.batch)
        self.target_at = (engine + np.uint64(self.target.ctypes.data)).reshape(-1, self.batch)
        self.plain_at = (arena + np.uint64(self.plain.ctypes.data)).reshape(-1, self.batch)

    def prepare(self, rounds: int) -> None:
        """Make the chains of all rounds, and fill the arena with those before the first.

        All of it is loaded once too: a daemon's client reads through a mapping of its own.
        """
        for _ in range(self.arena_steps + rounds):
            hashes = self.random.integers(0, 256, (self.batch, 32), np.uint8)
            self.chains.append(BlockHashes.chain(hashes))
        for step in range(self.arena_steps):
            self._put(step)
        for step in range(self.arena_steps):
            self._load(step)

    def _put(self, step: int) -> None:
        done = self.store.put(
            self.chains[step], self.from_engine, self.ids[step % self.engine_steps]
        )
        assert done.wait().num_stored == self.batch

    def put(self, number: int) -> None:
        self._put(number + self.arena_steps)

    def load(self, number: int) -> None:
        """Load what was put a quarter of an arena ago: out of every cache, not yet evicted."""
        self._load(number + self.arena_steps * 3 // 4)

    def _load(self, step: int) -> None:
        done = self.store.load(
            self.chains[step], self.to_engine, self.ids[step % self.engine_steps]
        )
        assert done.wait().num_blocks == self.batch

    def copy_in(self, number: int) -> None:
        _native.codec_copy(
            self.source_at[number % self.engine_steps],
            self.plain_at[number % self.arena_steps],
            self.block_bytes,
        )

    def copy_out(self, number: int) -> None:
        _native.codec_copy(
            self.plain_at[(number + self.arena_steps // 2) % self.arena_steps],
            self.target_at[number % self.engine_steps],
            self.block_bytes,
        )

    def check(self, rounds: int) -> None:
        """Load half of the engine's blocks once more: the bytes are those that were put.

        `rounds` is how often `put` was called.
        """
        np.invert(self.source, out=self.target)
        steps = self.engine_steps // 2
        for number in range(rounds - steps, rounds):
            self.load(number)
        same = np.count_nonzero(self.source == self.target)
        assert same == steps * self.batch * self.block_bytes

    def measure(self, rounds: int) -> dict[str, Seconds]:
        self.prepare(rounds)
        taken = in_turn(
            {
                "put": self.put,
                "copy_in": self.copy_in,
                "load": self.load,
                "copy_out": self.copy_out,
            },
            rounds,
        )
        self.check(rounds)
        return taken


def touched_memory(size: int) -> Bytes:
    """Memory on a page's edge. numpy's own is 16 bytes off, which costs memcpy and us half
    of the speed; tensors of torch begin on a cache line's edge."""
    room = np.ones(size + 4096, np.uint8)
    start = -room.ctypes.data % 4096
    return room[start : start + size]


def walk_of(
    store: Store,
    scale: Scale,
    batch: int,
    buffers: Callable[[Bytes, BlockSpec], BlockBuffers] = contiguous,
) -> Walk:
    """A walk through a store that has `arena_bytes`, or more."""
    engine_bytes, arena_bytes = scale.pick(256, 32) * MIB, scale.pick(512, 64) * MIB
    source, target = touched_memory(engine_bytes), touched_memory(engine_bytes)
    source[:] = np.frombuffer(np.random.default_rng(0).bytes(engine_bytes), np.uint8)
    return Walk(store, source, target, touched_memory(arena_bytes), buffers, batch)


@contextmanager
def _walk(
    spec: BlockSpec,
    scale: Scale,
    batch: int,
    buffers: Callable[[Bytes, BlockSpec], BlockBuffers] = contiguous,
) -> Iterator[Walk]:
    arena_bytes = scale.pick(512, 64) * MIB
    # Headers take less than 4 KiB a block in front of the slots.
    with kvstore.open(spec, cpu=arena_bytes + arena_bytes // 64 + 4 * MIB, threads=1) as store:
        yield walk_of(store, scale, batch, buffers)


def batches(scale: Scale) -> list[Figure]:
    """put and load of 16 blocks of 1 MiB: dense rows, and an engine's tensors a layer."""
    rounds = scale.pick(200, 20)
    figures = []
    for suffix, buffers in (("", contiguous), ("_paged", paged)):
        with _walk(SPEC_1MIB, scale, 16, buffers) as walk:
            taken = walk.measure(rounds)
        if not suffix:
            copies = np.concatenate((taken["copy_in"], taken["copy_out"]))
            figures.append(Figure("memcpy_16x1MiB", 16 * MIB / median(copies) / 1e9, "GB/s"))
        for ours, theirs in (("put", "copy_in"), ("load", "copy_out")):
            rate = 16 * MIB / median(taken[ours]) / 1e9
            ratio = speedup(taken[ours], taken[theirs])
            figures.append(Figure(f"{ours}_16x1MiB{suffix}", rate, "GB/s", ratio, MEMCPY))
    return figures


def singles(scale: Scale) -> list[Figure]:
    """put and get of 64 KiB blocks, one a call."""
    with _walk(SPEC_64KIB, scale, 1) as walk:
        taken = walk.measure(scale.pick(4000, 400))
    return [
        Figure(
            f"{name}_64KiB_p50_us",
            median(taken[ours]) * 1e6,
            "us",
            speedup(taken[ours], taken[theirs]),
            MEMCPY,
        )
        for name, ours, theirs in (("get", "load", "copy_out"), ("put", "put", "copy_in"))
    ]
