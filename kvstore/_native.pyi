from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

# --- hash
def hash_blocks(
    token_ids: list[int] | tuple[int, ...] | npt.NDArray[Any],
    block_tokens: int,
    parent: bytes | None,
    extra_keys: Sequence[bytes | None] | None,
    algorithm: str,
) -> npt.NDArray[np.uint8]: ...
def hash_chain_root(algorithm: str) -> bytes: ...
def cbor(value: tuple[Any, ...]) -> bytes: ...
def blake3(data: bytes, key: bytes | None = None) -> bytes: ...
def sha256(data: bytes) -> bytes: ...
def set_hash_simd_limit(level: int) -> None: ...

# --- copy
class CopyPlan:
    """Where the bytes of canonical blocks lie in an engine's tensors; checked and immutable.

    `runs` has one row a run: base address, block_stride, engine_stride, block_offset, piece_stride,
    count, bytes (csrc/copy/plan.h). They must cover [0, block_bytes) exactly once, in any order.
    The plan holds addresses only: its owner keeps the memory alive.
    """

    def __init__(
        self,
        runs: npt.NDArray[np.int64],
        block_bytes: int,
        num_blocks: int,
        *,
        writable: bool = True,
    ) -> None: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def writable(self) -> bool: ...
    @property
    def num_runs(self) -> int: ...
    @property
    def runs(self) -> npt.NDArray[np.int64]:
        """The merged runs, in payload order."""

def xxh3(data: Buffer | npt.NDArray[Any]) -> int:
    """XXH3-64 of a contiguous buffer."""

def checksum(addr: int, bytes: int) -> int: ...
def copy_with_checksum(to: int, from_: int, bytes: int) -> int: ...
def gather(
    plan: CopyPlan,
    block_ids: npt.NDArray[np.int64],
    addrs: npt.NDArray[np.uint64],
    checksums: npt.NDArray[np.uint64] | None = None,
    threads: int = 1,
) -> None:
    """Canonical block at addrs[i] <- engine block block_ids[i]; fills `checksums` where given."""

def scatter(
    plan: CopyPlan,
    block_ids: npt.NDArray[np.int64],
    addrs: npt.NDArray[np.uint64],
    checksums: npt.NDArray[np.uint64] | None = None,
    threads: int = 1,
) -> None:
    """Engine block block_ids[i] <- canonical block at addrs[i]; ids must be distinct."""

def gather_range(
    plan: CopyPlan,
    block_ids: npt.NDArray[np.int64],
    addrs: npt.NDArray[np.uint64],
    offset_begin: int,
    offset_end: int,
    threads: int = 1,
) -> None:
    """As gather, for the payload bytes [offset_begin, offset_end) of every block."""

def scatter_range(
    plan: CopyPlan,
    block_ids: npt.NDArray[np.int64],
    addrs: npt.NDArray[np.uint64],
    offset_begin: int,
    offset_end: int,
    threads: int = 1,
) -> None: ...
def checksum_blocks(
    addrs: npt.NDArray[np.uint64],
    bytes: int,
    checksums: npt.NDArray[np.uint64],
    threads: int = 1,
) -> None: ...
def dlpack_describe(
    capsule: object,
) -> tuple[int, tuple[int, ...], tuple[int, ...], int, str, int, int, bool]:
    """(address, shape, strides in bytes, itemsize, dtype, device type, device id, readonly)."""

def _simd_level() -> int: ...
def _force_simd_level(level: int) -> bool: ...

# --- quant
CODEC_HEADER_BYTES: int

class CodecFormat:
    """What encoder and decoder of a block must agree on; immutable."""

    def __init__(
        self,
        *,
        codec: int,
        element: int,
        planes: int,
        tokens: int,
        heads: int,
        dim: int,
        raw_bytes: int,
        shuffle_width: int = 0,
    ) -> None: ...
    @property
    def encoded_bytes(self) -> int: ...

def codec_simd_level() -> int: ...
def codec_encode(
    format: CodecFormat,
    raw_addrs: npt.NDArray[np.uint64],
    out: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.uint64],
    statuses: npt.NDArray[np.uint8],
    errors: npt.NDArray[np.float64],
    simd: int | None = None,
) -> None: ...
def codec_decode(
    format: CodecFormat,
    encoded_addrs: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.uint64],
    out_addrs: npt.NDArray[np.uint64],
    statuses: npt.NDArray[np.uint8],
    simd: int | None = None,
) -> None: ...
def codec_check_headers(
    format: CodecFormat,
    encoded_addrs: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.uint64],
    encoded_bytes: npt.NDArray[np.uint64],
    statuses: npt.NDArray[np.uint8],
) -> None: ...
def codec_write_header(
    format: CodecFormat, out: npt.NDArray[np.uint8], encoded_bytes: int
) -> None: ...
def codec_copy(
    from_addrs: npt.NDArray[np.uint64], to_addrs: npt.NDArray[np.uint64], bytes: int
) -> None: ...
def codec_shuffle(address: int, shuffled: npt.NDArray[np.uint8], width: int) -> None: ...
def codec_unshuffle(shuffled: npt.NDArray[np.uint8], address: int, width: int) -> None: ...

# --- io
class IoQueue:
    """Batches of extents to and from files; kind "auto", "uring" or "threads"."""

    def __init__(self, kind: str = "auto", depth: int = 16) -> None: ...
    @property
    def kind(self) -> str: ...
    @property
    def depth(self) -> int: ...
    def write(
        self,
        fds: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.uint64],
        addrs: npt.NDArray[np.uint64],
        bytes: npt.NDArray[np.uint64],
    ) -> npt.NDArray[np.int32]: ...
    def read(
        self,
        fds: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.uint64],
        addrs: npt.NDArray[np.uint64],
        bytes: npt.NDArray[np.uint64],
        checksums: npt.NDArray[np.uint64] | None = None,
    ) -> npt.NDArray[np.int32]: ...

def io_checksum(buffer: bytes | bytearray | memoryview | npt.NDArray[Any]) -> int: ...
def io_checksum_rows(rows: npt.NDArray[np.uint8], covered: int) -> npt.NDArray[np.uint64]: ...
def io_checksum_at(
    addrs: npt.NDArray[np.uint64], bytes: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]: ...

# --- policy
def eviction_policy_names() -> list[str]: ...

class EvictionPolicy:
    def __init__(self, name: str, num_slots: int) -> None: ...
    def add(self, slot: int, key: int) -> None: ...
    def touch(self, slot: int) -> None: ...
    def touch_all(self, slots: npt.NDArray[np.uint32]) -> None: ...
    def remove(self, slot: int) -> None: ...
    def due(self, slot: int) -> None: ...
    def pop_victim(
        self, evictable: npt.NDArray[np.bool_] | Callable[[int], bool]
    ) -> int | None: ...
    @property
    def size(self) -> int: ...

class PolicySimulator:
    def __init__(self, name: str, capacity_blocks: int) -> None: ...
    def request(self, ids: npt.NDArray[np.uint64]) -> int: ...
    @property
    def resident(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def checks(self) -> int: ...

# --- core
@final
class BlockIndex:
    def __init__(self) -> None: ...
    def insert_chain(self, namespace_id: int, hashes: npt.NDArray[np.uint8]) -> None: ...
    def remove_leaf(self, namespace_id: int, hash: bytes) -> bool: ...
    def match(self, namespace_id: int, hashes: npt.NDArray[np.uint8], start: int) -> int: ...
    def count(self, namespace_id: int, hashes: npt.NDArray[np.uint8]) -> int: ...
    def __len__(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...

@final
class StoreCore:
    def __init__(
        self, arena_bytes: int, chunk_bytes: int, huge_pages: bool, policy: str
    ) -> None: ...
    def add_namespace(self, block_bytes: int) -> int: ...
    def block_bytes(self, namespace_id: int) -> int: ...
    def new_owner(self) -> int: ...
    def release_owner(self, owner: int) -> None: ...
    def match(self, namespace_id: int, hashes: npt.NDArray[np.uint8], start: int) -> int: ...
    def residency(
        self, namespace_id: int, hashes: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.uint8]: ...
    def wait_for(
        self,
        namespace_id: int,
        hashes: npt.NDArray[np.uint8],
        start: int,
        want: int,
        timeout_seconds: float,
    ) -> int: ...
    def reserve(
        self,
        owner: int,
        namespace_id: int,
        hashes: npt.NDArray[np.uint8],
        start: int,
        parent: bytes | None,
        only_from_ssd: bool,
    ) -> tuple[int, npt.NDArray[np.uint8], npt.NDArray[np.uint64]]: ...
    def commit(
        self,
        owner: int,
        reservation: int,
        checksums: npt.NDArray[np.uint64] | None,
        ok: npt.NDArray[np.bool_] | None,
    ) -> bool: ...
    def abort(self, owner: int, reservation: int) -> None: ...
    def acquire(
        self,
        owner: int,
        namespace_id: int,
        hashes: npt.NDArray[np.uint8],
        ttl_seconds: float | None,
        use: bool,
    ) -> tuple[
        int,
        npt.NDArray[np.uint64],
        npt.NDArray[np.uint64],
        npt.NDArray[np.uint64],
        npt.NDArray[np.uint64],
    ]: ...
    def release(self, owner: int, lease: int) -> bool: ...
    def expire_leases(self) -> int: ...
    def put(
        self,
        owner: int,
        namespace_id: int,
        hashes: npt.NDArray[np.uint8],
        start: int,
        parent: bytes | None,
        plan: CopyPlan,
        block_ids: npt.NDArray[np.int64],
        threads: int,
    ) -> tuple[int, int, int, int, int, int]: ...
    def load(
        self,
        owner: int,
        namespace_id: int,
        hashes: npt.NDArray[np.uint8],
        plan: CopyPlan,
        block_ids: npt.NDArray[np.int64],
        verify: bool,
        threads: int,
    ) -> tuple[int, bool]: ...
    def remove(self, namespace_id: int, hashes: npt.NDArray[np.uint8]) -> int: ...
    def clear(self, namespace_id: int) -> None: ...
    def set_ssd(self, records: npt.NDArray[np.void]) -> None: ...
    def move_ssd(
        self, from_records: npt.NDArray[np.void], to_records: npt.NDArray[np.void]
    ) -> None: ...
    def describe(self, namespace_id: int, hashes: npt.NDArray[np.uint8]) -> bytes: ...
    def ssd_gap(self, namespace_id: int, hash: bytes) -> bytes: ...
    def drop_ssd(self, namespace_id: int, hash: bytes, segment: int, page: int) -> None: ...
    def survivors(self, records: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]: ...
    def restore(self, records: npt.NDArray[np.void]) -> int: ...
    def take_garbage(self) -> bytes: ...
    def enable_events(self, capacity: int) -> None: ...
    def event_sequence(self, namespace_id: int) -> int: ...
    def events_after(self, namespace_id: int, after: int) -> bytes: ...
    def stats(self) -> dict[str, int]: ...
    @property
    def arena_fd(self) -> int: ...
    @property
    def arena_bytes(self) -> int: ...
    @property
    def arena(self) -> npt.NDArray[np.uint8]: ...
