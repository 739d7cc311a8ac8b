"""What a StoreTransfer moved. Apart from it, so that routers can count without torch."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class TransferCounters:
    """What passed through one transfer. queried = hit_cpu + hit_ssd + missed, in blocks.

    Seconds are those that the worker's thread spent in the store, copies included.
    """

    queried_blocks: int = 0
    hit_cpu_blocks: int = 0
    hit_ssd_blocks: int = 0
    saved_blocks: int = 0  # copied; those that were there already are not counted
    loaded_bytes: int = 0
    saved_bytes: int = 0
    errors: int = 0
    load_seconds: float = 0.0
    save_seconds: float = 0.0

    def __add__(self, other: TransferCounters) -> TransferCounters:
        return self._with(other, 1)

    def __sub__(self, other: TransferCounters) -> TransferCounters:
        return self._with(other, -1)

    def _with(self, other: TransferCounters, sign: int) -> TransferCounters:
        names = [field.name for field in fields(self)]
        return TransferCounters(
            **{name: getattr(self, name) + sign * getattr(other, name) for name in names}
        )
