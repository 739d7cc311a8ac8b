"""A client with the methods of Mooncake Store that engines call, on kvstore."""

from .memory import MooncakeHostMemAllocator
from .store import MooncakeDistributedStore
from .types import (
    ObjectDataType,
    ReplicaDescriptor,
    ReplicaStatus,
    ReplicateConfig,
    SoftPinAction,
)

__all__ = [
    "MooncakeDistributedStore",
    "MooncakeHostMemAllocator",
    "ObjectDataType",
    "ReplicaDescriptor",
    "ReplicaStatus",
    "ReplicateConfig",
    "SoftPinAction",
]
