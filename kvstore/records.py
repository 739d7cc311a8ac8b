"""RECORD: a block's identity and place on ssd, as the native core and the ssd tier exchange it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Packed like PackedRecord in csrc/python/bind_core.cc.
RECORD = np.dtype(
    [
        ("namespace", "<u4"),
        ("hash", "u1", (32,)),
        ("parent", "u1", (32,)),
        ("depth", "<u4"),  # 1-based place in its chain; 0: unknown
        ("segment", "<u4"),
        ("page", "<u4"),  # 4 KiB pages from the start of the segment
        ("stored_bytes", "<u4"),
        ("codec", "u1"),
        ("checksum", "<u8"),  # XXH3-64 of the payload
        ("stored_checksum", "<u8"),  # XXH3-64 of the stored bytes
    ]
)
NOT_ON_SSD = 0xFFFFFFFF
NO_CODEC = 0

Records = npt.NDArray[np.void]


def records_from(packed: bytes) -> Records:
    """Return the rows that the core packed, writable."""
    return np.frombuffer(bytearray(packed), RECORD)


def hash_rows(packed: bytes) -> npt.NDArray[np.uint8]:
    """Return packed BlockHashes as an (n, 32) array."""
    return np.frombuffer(packed, np.uint8).reshape(-1, 32)
