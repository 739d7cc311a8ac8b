"""Blocks whose bytes follow from their hash, and stores small enough to fill."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kvstore
from kvstore import BlockHashes, BlockSpec, ContiguousBlocks, Namespace, PagedBuffers, Store

# 64 KiB in 4 layers: a store of 1 MiB of DRAM, the least there is, holds 15 of them.
SPEC = BlockSpec(num_layers=4, num_kv_heads=1, head_dim=64, block_tokens=32, dtype="float32")
BLOCK_BYTES = SPEC.block_bytes
NAMESPACE = Namespace("model", SPEC)
SLOTS = 15
WAIT_S = 60.0  # a bound for what must come, not a duration: nothing passes or fails by it in time

Bytes = npt.NDArray[np.uint8]


def chain(seed: int, num_blocks: int, parent: BlockHashes | None = None) -> BlockHashes:
    """A chain of blocks; chains of one seed share their prefix."""
    tokens = np.arange(num_blocks * 4, dtype=np.int64) + seed * 100_000
    return kvstore.hash_blocks(tokens, 4, parent=parent)


def bytes_of(block_hash: bytes, size: int = BLOCK_BYTES) -> Bytes:
    seed = int.from_bytes(block_hash[:8], "little")
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def payload(hashes: BlockHashes, size: int = BLOCK_BYTES) -> Bytes:
    if len(hashes) == 0:
        return np.zeros((0, size), np.uint8)
    return np.stack([bytes_of(h, size) for h in hashes])


def buffers_of(hashes: BlockHashes, size: int = BLOCK_BYTES) -> ContiguousBlocks:
    return ContiguousBlocks(payload(hashes, size))


def put(store: Store, hashes: BlockHashes, **options: Any) -> kvstore.TransferResult:
    size = store.namespace.spec.block_bytes
    return store.put(hashes, buffers_of(hashes, size), **options).wait(WAIT_S)


def load(store: Store, hashes: BlockHashes, **options: Any) -> int:
    """Load, compare every byte that counts, and return how many leading blocks came."""
    size = store.namespace.spec.block_bytes
    room = np.zeros((len(hashes), size), np.uint8)
    result = store.load(hashes, ContiguousBlocks(room), **options).wait(WAIT_S)
    assert result.num_blocks + result.num_missed == len(hashes)
    assert_exact(hashes, room, result.num_blocks)
    return result.num_blocks


def assert_exact(hashes: BlockHashes, room: Bytes, count: int) -> None:
    for i in range(count):
        assert np.array_equal(room[i], bytes_of(hashes[i], room.shape[1])), f"block {i} is wrong"


def paged(num_blocks: int, fill: Sequence[bytes] = ()) -> tuple[Bytes, PagedBuffers]:
    """The reference engine's pool; block i holds the bytes of `fill[i]`."""
    pool = np.zeros((num_blocks, 4, 2, 32, 1, 64), np.float32)
    raw = pool.view(np.uint8).reshape(num_blocks, BLOCK_BYTES)
    for i, block_hash in enumerate(fill):
        raw[i] = bytes_of(block_hash)
    return raw, PagedBuffers.reference(pool, SPEC)


def open_store(path: Path | None = None, **settings: Any) -> Store:
    """A store of 15 slots; with `path`, an ssd of 4 MiB below it."""
    chosen: dict[str, Any] = {"cpu": "1MiB", "chunk": "1MiB"}
    if path is not None:
        chosen.update(ssd=str(path), ssd_capacity="4MiB", ssd_segment="512KiB")
    namespace = settings.pop("namespace", NAMESPACE)
    return kvstore.open(namespace, **{**chosen, **settings})
