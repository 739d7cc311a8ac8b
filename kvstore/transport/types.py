"""What the transports' parts say to each other, and what peers must know of one another.

A move is one-sided: `read` brings pieces of one remote region into local memory, `write` the other
way round. The peer's process does nothing for it but serve its memory.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.errors import ConfigError, IncompatibleError

VERSION = 1
INFO_BYTES_MAX = 16 << 20
SECRET_BYTES = 32
_CHECKSUM_THREADS = 2

Statuses: TypeAlias = npt.NDArray[np.uint8]
U64s: TypeAlias = npt.NDArray[np.uint64]


class Status(IntEnum):
    """What became of one piece. The local memory of one that is not OK may hold anything."""

    OK = 0
    DAMAGED = 1  # what arrived has another checksum
    REFUSED = 2  # no such region, outside of it, not writable, or of another epoch
    LOST = 3  # the link died before the piece was known to be whole
    LATE = 4  # the deadline came first
    CANCELLED = 5


# Of what peers say; no sum of two of them overflows.
Natural: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Positive: TypeAlias = Annotated[int, msgspec.Meta(gt=0, lt=1 << 62)]


class Region(msgspec.Struct, frozen=True):
    """Memory of this process that peers may read, or write too."""

    region_id: int
    address: int
    num_bytes: int
    writable: bool


class RegionInfo(msgspec.Struct, frozen=True):
    """What a peer must know of a region. `keys`: what each mover that can move it needs."""

    region_id: Natural
    address: Natural
    num_bytes: Positive
    writable: bool
    keys: dict[str, bytes] = {}


class EndpointInfo(msgspec.Struct, frozen=True):
    """What a peer must know of an endpoint.

    It carries the endpoint's secret, which opens its regions: it goes over authenticated channels
    only. `movers`: what each of them says of itself.
    """

    version: int
    boot_id: str
    epoch: Annotated[int, msgspec.Meta(ge=0)]
    pid: Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
    pid_namespace: str
    has_rdma: bool
    movers: dict[str, bytes]
    regions: list[RegionInfo]
    secret: bytes

    def encode(self) -> bytes:
        return _encoder.encode(self)

    @staticmethod
    def decode(data: bytes) -> EndpointInfo:
        """
        Raises:
            IncompatibleError: no such message, or of another version.
        """
        if len(data) > INFO_BYTES_MAX:
            raise IncompatibleError(f"endpoint: {len(data)} bytes; at most {INFO_BYTES_MAX}")
        try:
            found = _version_decoder.decode(data).version
            if found != VERSION:
                raise IncompatibleError(f"endpoint: version {found}; this is version {VERSION}")
            return _decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise IncompatibleError(f"endpoint: not a description of one: {error}") from error


class _Version(msgspec.Struct):
    version: int


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(EndpointInfo)
_version_decoder = msgspec.msgpack.Decoder(_Version)


class Batch:
    """n pieces between local memory and one remote region.

    Args:
        local_addresses: where each lies here, shape (n,).
        remote_offsets: from the start of the region, shape (n,).
        lengths: in bytes, shape (n,), or one for all.
        checksums: XXH3-64 that each must have, shape (n,). A read is checked on arrival; a write
            by the receiver, where the mover has one (tcp).

    Raises:
        ConfigError: shapes do not fit.
    """

    __slots__ = ("checksums", "lengths", "local_addresses", "remote_offsets")

    def __init__(
        self, local_addresses: Any, remote_offsets: Any, lengths: Any, checksums: Any = None
    ) -> None:
        self.local_addresses = _u64s("local_addresses", local_addresses, None)
        count = len(self.local_addresses)
        self.remote_offsets = _u64s("remote_offsets", remote_offsets, count)
        if np.ndim(lengths) == 0:
            lengths = np.full(count, lengths, np.uint64)
        self.lengths = _u64s("lengths", lengths, count)
        self.checksums = None if checksums is None else _u64s("checksums", checksums, count)

    def __len__(self) -> int:
        return len(self.local_addresses)

    @property
    def num_bytes(self) -> int:
        return int(self.lengths.sum())

    def pick(self, places: Any) -> Batch:
        """Those pieces: a slice, indices, or a mask."""
        sums = self.checksums
        return Batch(
            self.local_addresses[places],
            self.remote_offsets[places],
            self.lengths[places],
            None if sums is None else sums[places],
        )

    def is_inside(self, num_bytes: int) -> npt.NDArray[np.bool_]:
        """Tell for each piece whether it lies within a region of `num_bytes`."""
        size = np.uint64(num_bytes)
        fits = self.lengths <= size
        inside: npt.NDArray[np.bool_] = fits & (self.remote_offsets <= size - self.lengths * fits)
        return inside


def _u64s(name: str, values: Any, count: int | None) -> U64s:
    array = np.ascontiguousarray(values, np.uint64)
    if array.ndim != 1 or (count is not None and len(array) != count):
        wanted = "(n,)" if count is None else f"({count},)"
        raise ConfigError(f"{name}: shape {array.shape}, not {wanted}")
    return array


def all_of(status: Status, count: int) -> Statuses:
    return np.full(count, status, np.uint8)


def checksums_of(addresses: U64s, lengths: U64s) -> U64s:
    """Return the checksum that each of these pieces of our memory must have where it arrives."""
    return _native.checksum_pieces(addresses, lengths, _CHECKSUM_THREADS)
