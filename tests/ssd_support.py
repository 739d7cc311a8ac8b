"""Blocks whose bytes follow from their number, and memory to move them: shared by the SSD tests."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.tiers.ssd import Locations, Records, SsdConfig, SsdTier

KINDS = ["threads", "uring"]
NAMESPACE = b"namespace-digest" * 2


def hash_of(number: int) -> bytes:
    return number.to_bytes(8, "big") * 4


def hashes_of(numbers: list[int]) -> npt.NDArray[np.uint8]:
    raw = b"".join(hash_of(number) for number in numbers)
    return np.frombuffer(raw, np.uint8).reshape(len(numbers), 32)


def payload_of(number: int, size: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng([number, size]).integers(0, 256, size, dtype=np.uint8)


@dataclass
class Memory:
    """Slots of equal size; page-aligned, or off by `shift` bytes."""

    count: int
    size: int
    shift: int = 0
    slots: npt.NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        pitch = -(-self.size // 4096) * 4096
        raw = np.zeros(self.count * pitch + 8192, np.uint8)
        start = -raw.ctypes.data % 4096 + self.shift
        self.slots = raw[start : start + self.count * pitch].reshape(self.count, pitch)

    @property
    def addrs(self) -> npt.NDArray[np.uint64]:
        pitch = self.slots.shape[1]
        return np.uint64(self.slots.ctypes.data) + np.arange(
            self.count, dtype=np.uint64
        ) * np.uint64(pitch)


def open_tier(path: Path, kind: str = "auto", **changes: Any) -> SsdTier:
    settings: dict[str, Any] = {"capacity_bytes": 8 << 20, "segment_bytes": 1 << 20, "io_depth": 8}
    return SsdTier(SsdConfig(path, io=kind, **{**settings, **changes}))


def write(
    tier: SsdTier,
    numbers: list[int],
    size: int = 5000,
    *,
    durable: bool = False,
    shift: int = 0,
    namespace: int | None = None,
) -> Locations:
    memory = Memory(len(numbers), size, shift)
    for slot, number in zip(memory.slots, numbers, strict=True):
        slot[:size] = payload_of(number, size)
    n = len(numbers)
    sizes = np.full(n, size, np.uint32)
    return tier.write(
        tier.register_namespace(NAMESPACE, b"test") if namespace is None else namespace,
        hashes_of(numbers),
        hashes_of([number + 1000 for number in numbers]),
        np.arange(n, dtype=np.uint32),
        memory.addrs,
        sizes,
        _native.io_checksum_at(memory.addrs, sizes.astype(np.uint64)),
        durable=durable,
    )


def read(tier: SsdTier, at: Locations | Records, shift: int = 0) -> list[bytes | None]:
    """The bytes of each block, None for a miss."""
    segments = at.segments if isinstance(at, Locations) else at.segment
    pages = at.pages if isinstance(at, Locations) else at.page
    sums = at.stored_checksums if isinstance(at, Locations) else at.stored_checksum
    memory = Memory(len(pages), int(at.stored_bytes.max(initial=1)), shift)
    ok = tier.read(segments, pages, at.stored_bytes, sums, memory.addrs)
    return [
        slot[:size].tobytes() if good else None
        for slot, size, good in zip(memory.slots, at.stored_bytes.tolist(), ok, strict=True)
    ]


def records(tier: SsdTier) -> dict[bytes, tuple[Records, int]]:
    """hash -> (batch of records, place in it)."""
    return {
        batch.hash[i].tobytes(): (batch, i) for batch in tier.recover() for i in range(len(batch))
    }


def contents(tier: SsdTier) -> dict[bytes, bytes | None]:
    """hash -> bytes of everything that a fresh opening would find; None for a miss."""
    found: dict[bytes, bytes | None] = {}
    for batch in tier.recover():
        got = read(tier, batch)
        found.update((batch.hash[i].tobytes(), got[i]) for i in range(len(batch)))
    return found


def keep(share: float) -> Callable[[Records], npt.NDArray[np.bool_]]:
    def choose(found: Records) -> npt.NDArray[np.bool_]:
        chosen: npt.NDArray[np.bool_] = np.arange(len(found)) < share * len(found)
        return chosen

    return choose
