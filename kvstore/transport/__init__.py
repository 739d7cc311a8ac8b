"""Transports: one-sided moves between the registered memory of two processes."""

from kvstore.transport.choice import MOVERS, Choice, choices
from kvstore.transport.endpoint import Endpoint, Link, Move
from kvstore.transport.memory import SharedMemory
from kvstore.transport.settings import TransportSettings
from kvstore.transport.types import Batch, EndpointInfo, Region, RegionInfo, Status, checksums_of

__all__ = [
    "MOVERS",
    "Batch",
    "Choice",
    "Endpoint",
    "EndpointInfo",
    "Link",
    "Move",
    "Region",
    "RegionInfo",
    "SharedMemory",
    "Status",
    "TransportSettings",
    "checksums_of",
    "choices",
]
