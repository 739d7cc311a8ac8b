"""TransferCounters: what one worker moved since it was last asked."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class TransferCounters:
    """All but the seconds are counts; blocks are blocks of any group."""

    loads: int = 0  # requests
    loads_failed: int = 0  # of those, came not, or not whole
    load_blocks: int = 0
    load_bytes: int = 0
    load_seconds: float = 0.0  # from the start of a load to its end, without the time in a queue
    saves: int = 0  # jobs
    save_blocks: int = 0  # copied into the store
    save_bytes: int = 0
    save_seconds: float = 0.0
    dropped_blocks: int = 0  # were to be saved, and are not in the store

    def add(self, other: TransferCounters) -> None:
        for declared in fields(self):
            name = declared.name
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __bool__(self) -> bool:
        return any(getattr(self, declared.name) for declared in fields(self))
