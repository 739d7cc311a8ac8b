"""The other classes that engines import from `mooncake.store`.

Most of what they say is about replicas and segments, which a kvstore daemon has none of: it is
taken and has no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np


class ObjectDataType(IntEnum):
    UNKNOWN = 0
    KVCACHE = 1
    TENSOR = 2
    WEIGHT = 3
    SAMPLE = 4
    ACTIVATION = 5
    GRADIENT = 6
    OPTIMIZER_STATE = 7
    METADATA = 8
    GENERAL = 9


class SoftPinAction(IntEnum):
    PRESERVE = 0
    ENABLE = 1
    DISABLE = 2


class ReplicaStatus(IntEnum):
    UNDEFINED = 0
    INITIALIZED = 1
    PROCESSING = 2
    COMPLETE = 3
    REMOVED = 4
    FAILED = 5


@dataclass
class ReplicateConfig:
    """Wishes about placement; none has an effect."""

    replica_num: int = 1
    nof_replica_num: int = 0
    dfs_replica_num: int = 0
    soft_pin_action: SoftPinAction = SoftPinAction.PRESERVE
    soft_pin_ttl_ms: int | None = None
    with_soft_pin: bool = False
    with_hard_pin: bool = False
    preferred_segment: str = ""
    preferred_segments: list[str] = field(default_factory=list)
    preferred_nof_segments: list[str] = field(default_factory=list)
    prefer_alloc_in_same_node: bool = False
    data_type: ObjectDataType = ObjectDataType.UNKNOWN
    group_ids: Sequence[str] | None = None


@dataclass(frozen=True)
class ReplicaDescriptor:
    """Where a value would be read now."""

    in_memory: bool
    status: ReplicaStatus = ReplicaStatus.COMPLETE

    def is_memory_replica(self) -> bool:
        return self.in_memory

    def is_disk_replica(self) -> bool:
        return not self.in_memory

    def is_local_disk_replica(self) -> bool:
        return not self.in_memory


class ValueBuffer(bytearray):
    """The bytes of a value, with the methods of Mooncake's buffers."""

    def ptr(self) -> int:
        return int(np.frombuffer(self, np.uint8).ctypes.data)

    def size(self) -> int:
        return len(self)
