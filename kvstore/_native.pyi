from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

# --- hash
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
# --- io
# --- policy
# --- core
