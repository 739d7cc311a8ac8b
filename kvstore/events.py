"""Events in the words of vLLM: what became available, what went, for routers and indexes.

A namespace's events are numbered without gaps. Each reader (a store, a client) has its own place in
them; a jump in `sequence` tells it that it fell behind the bounded queue, and that it must look
again at what it thinks it knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Packed like PackedEvent in csrc/python/bind_core.cc.
_EVENT = np.dtype(
    [
        ("sequence", "<u8"),
        ("kind", "u1"),
        ("tier", "u1"),
        ("namespace", "<u4"),
        ("hash", "V32"),
        ("parent", "V32"),
        ("depth", "<u4"),
    ]
)
_STORED, _REMOVED, _CLEARED = range(3)
_MEDIUM = ("CPU", "STORAGE")  # vLLM's names of our cpu and ssd tiers


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Blocks became readable in a tier. `parent_block_hash` is None for the first of a chain."""

    sequence: int
    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    block_size: int  # tokens
    medium: str


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Blocks left a tier."""

    sequence: int
    block_hashes: list[bytes]
    medium: str


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """The namespace was cleared in all tiers."""

    sequence: int


Event = BlockStored | BlockRemoved | AllBlocksCleared


def last_sequence(packed: bytes, before: int) -> int:
    """Return the number of the last of packed rows, `before` when there are none."""
    rows = np.frombuffer(packed, _EVENT)
    return int(rows[-1]["sequence"]) if len(rows) else before


def decode_events(packed: bytes, block_tokens: int) -> Iterator[Event]:
    """Yield the events of one namespace from the core's packed rows.

    Rows that continue each other (one put, one chain) become one event, whose `sequence` is that of
    its last row.
    """
    rows = np.frombuffer(packed, _EVENT)
    first = 0
    for i in range(1, len(rows) + 1):
        if i < len(rows) and _continues(rows[i - 1], rows[i]):
            continue
        yield _event(rows[first:i], block_tokens)
        first = i


def _continues(before: np.void, row: np.void) -> bool:
    if row["kind"] != before["kind"] or row["tier"] != before["tier"] or row["kind"] == _CLEARED:
        return False
    if int(row["sequence"]) != int(before["sequence"]) + 1:
        return False
    return bool(row["kind"] == _REMOVED or row["parent"].tobytes() == before["hash"].tobytes())


def _event(rows: np.ndarray, block_tokens: int) -> Event:
    kind, sequence = rows[0]["kind"], int(rows[-1]["sequence"])
    if kind == _CLEARED:
        return AllBlocksCleared(sequence)
    hashes = [row["hash"].tobytes() for row in rows]
    medium = _MEDIUM[rows[0]["tier"]]
    if kind == _REMOVED:
        return BlockRemoved(sequence, hashes, medium)
    parent = rows[0]["parent"].tobytes()
    return BlockStored(sequence, hashes, parent if any(parent) else None, block_tokens, medium)
