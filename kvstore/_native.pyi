from typing import Any

import numpy as np
import numpy.typing as npt

# --- hash
# --- copy
# --- quant
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
# --- core
