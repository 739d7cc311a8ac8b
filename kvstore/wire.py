"""The control protocol, version 2: what both ends must agree on.

    frame:  magic "KVS2" | op u8 | status u8 | flags u16 | body length u32 | id u32 | body

docs/design/0003-daemon.md has the table of all bodies. Hot requests are fixed binary and are read
and written by csrc/net; those of them that Python has to answer are parsed here. The rest are
msgpack of the messages below: typed, unknown fields refused, nothing in them is code.

Every parser takes bytes from a stranger: it checks lengths before it touches anything, and raises
IncompatibleError for what it cannot read.
"""

from __future__ import annotations

import math
import struct
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore.block import BlockHashes
from kvstore.errors import IncompatibleError

VERSION = 2
MAGIC = b"KVS2"
HEADER = struct.Struct("<4sBBHII")
NONCE_BYTES = 32

# A reply's status is 1 + the place of the error's name here; 0 is no error. The order is fixed:
# csrc/net knows some of the numbers.
ERRORS = (
    "KVStoreError",
    "ConfigError",
    "IncompatibleError",
    "InUseError",
    "StoreClosedError",
    "OutOfSpaceError",
    "CorruptError",
    "StorageError",
    "PeerUnavailableError",
    "DeadlineExceededError",
    "ValueError",
    "TypeError",
    "IndexError",
    "KeyError",
)


class Op(IntEnum):
    """What a frame asks for. From 200 on: not on the wire, but notices of the native server."""

    MATCH = 1
    LOOKUP = 2
    RESIDENCY = 3
    ACQUIRE = 4
    RELEASE = 5
    RESERVE = 6
    COMMIT = 7
    ABORT = 8
    WAIT_FOR = 9
    READ = 10
    WRITE = 11
    MAP = 12
    PING = 13
    QUIESCED = 14
    HELLO = 32
    AUTH = 33
    CALL = 34
    NOTICE_STORED = 200
    NOTICE_PREFETCH = 201
    NOTICE_USED = 202
    GONE = 203


def status_of(error: BaseException) -> int:
    """Return the status that names this error, or the nearest of its classes; never 0."""
    for kind in type(error).__mro__:
        if kind.__name__ in ERRORS:
            return ERRORS.index(kind.__name__) + 1
    return 1


# --- binary bodies that reach Python

_CHAIN = struct.Struct("<qII32s")
_ACQUIRE = struct.Struct("<ddQ")
_COMMIT = struct.Struct("<QQQ")
_U64 = struct.Struct("<Q")
_HAS_PARENT = 1


class AcquireRequest(NamedTuple):
    ttl: float | None
    wait: float  # seconds from when the request was received
    is_pin: bool
    hashes: BlockHashes


class CommitRequest(NamedTuple):
    reservation: int
    ack: int  # place in ACK_LEVELS
    checksums: npt.NDArray[np.uint64]
    hashes: BlockHashes


def pack_chain(hashes: BlockHashes) -> bytes:
    parent = hashes.parent
    flags = 0 if parent is None else _HAS_PARENT
    head = _CHAIN.pack(hashes.start, flags, len(hashes), parent or bytes(32))
    return head + hashes.array.tobytes()


def parse_chain(body: bytes, offset: int = 0, trailing: int = 0) -> BlockHashes:
    """Return the chain that fills `body` from `offset` on, but for `trailing` bytes."""
    if len(body) - offset - trailing < _CHAIN.size:
        raise IncompatibleError(f"chain: {len(body) - offset - trailing} bytes are no chain")
    start, flags, count, parent = _CHAIN.unpack_from(body, offset)
    begin = offset + _CHAIN.size
    if len(body) - begin - trailing != count * 32:
        raise IncompatibleError(
            f"chain: {len(body) - begin - trailing} bytes are not {count} hashes"
        )
    if flags & ~_HAS_PARENT:
        raise IncompatibleError(f"chain: unknown flags {flags:#x}")
    if start > 0 and not flags & _HAS_PARENT:
        raise IncompatibleError(f"chain: starts at block {start}, but has no parent")
    array = np.frombuffer(body, np.uint8, count * 32, begin).reshape(-1, 32)
    if start < 0:
        return BlockHashes.of(array)
    return BlockHashes.chain(array, start, parent if flags & _HAS_PARENT else None)


def parse_acquire(body: bytes) -> AcquireRequest:
    if len(body) < _ACQUIRE.size:
        raise IncompatibleError(f"acquire: {len(body)} bytes are too few")
    ttl, wait, flags = _ACQUIRE.unpack_from(body)
    if math.isnan(ttl) or math.isnan(wait):
        raise IncompatibleError("acquire: a time is not a number")
    hashes = parse_chain(body, _ACQUIRE.size)
    return AcquireRequest(None if ttl < 0 else ttl, wait, bool(flags & 1), hashes)


def parse_commit(body: bytes) -> CommitRequest:
    """The body of COMMIT, and what comes before the payload of WRITE."""
    if len(body) < _COMMIT.size:
        raise IncompatibleError(f"commit: {len(body)} bytes are too few")
    reservation, ack, count = _COMMIT.unpack_from(body)
    if count > (len(body) - _COMMIT.size) // 8:
        raise IncompatibleError(f"commit: {count} checksums in {len(body)} bytes")
    sums = np.frombuffer(body, np.uint64, count, _COMMIT.size)
    return CommitRequest(reservation, ack, sums, parse_chain(body, _COMMIT.size + 8 * count))


def parse_quiesced(body: bytes) -> int:
    """The writer id in the body of QUIESCED."""
    if len(body) != _U64.size:
        raise IncompatibleError(f"quiesced: {len(body)} bytes are no writer id")
    return int(_U64.unpack(body)[0])


def pack_u64(*values: int) -> bytes:
    return np.array(values, np.uint64).tobytes()


# --- messages in msgpack


class Message(msgspec.Struct, tag_field="is", forbid_unknown_fields=True):
    """Base of all messages."""


class Hello(Message, tag="hello", omit_defaults=True):
    """The first frame of a connection. What has its default is left out, so that daemons which do
    not know of it yet read the rest."""

    version: int
    namespace: dict[str, Any]  # Namespace.describe(); {}: no namespace, CALL and PING only
    token: bytes = b""  # of the first Welcome: this is one more connection of that client
    tenant: str = ""  # "": the default tenant, or the one that our uid belongs to
    nonce: bytes = b""  # NONCE_BYTES random bytes where a tenant's secret may be asked for
    peer: bool = False  # a daemon that acts for a tenant of its own, and proves the peer secret


class Challenge(Message, tag="challenge"):
    """The daemon proves that it knows the tenant's secret, and asks the same. See kvstore.auth."""

    nonce: bytes
    proof: bytes


class Auth(Message, tag="auth"):
    proof: bytes


class Welcome(Message, tag="welcome", omit_defaults=True):
    token: bytes  # names this client to further connections; secret
    client: int  # its number, which is its writer id too
    epoch: bytes  # 16 bytes, others with each start of the daemon
    arena_id: bytes  # 16 bytes, the same for as long as the arena lives
    arena_bytes: int
    block_bytes: int  # 0: no namespace
    may_map: bool
    may_map_writable: bool
    verify_always: bool
    threads: int
    lease_seconds: float
    # For peers only: kvstore.transport.EndpointInfo, which holds secrets, and the arena's region.
    endpoint: bytes = b""
    region: int = 0


class Call(Message):
    """What needs no speed. Chains are packed as `pack_chain` does."""


class Describe(Call, tag="describe"):
    """-> rows of kvstore.records.RECORD, packed."""

    chain: bytes


class Prefetch(Call, tag="prefetch"):
    """-> how many leading blocks are in DRAM once `timeout` seconds went by, or all are."""

    chain: bytes
    timeout: float


class Fetch(Call, tag="fetch"):
    """-> how many leading blocks are in some tier once those that were missing had `timeout`
    seconds to come from `holders`: addresses of other daemons."""

    chain: bytes
    holders: list[str]
    timeout: float


class Remove(Call, tag="remove"):
    """-> how many blocks went."""

    chain: bytes


class Corrupt(Call, tag="corrupt"):
    """A reader says that a block fails its checksum. -> whether it does, and was removed."""

    block_hash: bytes


class Clear(Call, tag="clear"):
    """-> None."""


class Flush(Call, tag="flush"):
    """-> whether all is on ssd."""

    timeout: float


class Events(Call, tag="events"):
    """-> the events of the namespace since the client's last call, packed; see kvstore.events."""


class Stats(Call, tag="stats"):
    """-> the daemon's metrics, name to value."""


class AdminStatus(Call, tag="admin.status"):
    """-> what `kvstore status --json` shows."""


class AdminInspect(Call, tag="admin.inspect"):
    """-> what is known of blocks of a namespace, by its number in AdminNamespaces."""

    namespace: int
    hashes: bytes  # packed; {}: only counts


class AdminNamespaces(Call, tag="admin.namespaces"):
    """-> a list of namespaces."""


class AdminVerify(Call, tag="admin.verify"):
    """Check the checksum of everything in DRAM. -> bytes checked, blocks removed, whole."""

    seconds: float


class AdminRestart(Call, tag="admin.restart"):
    """Finish what is under way and start again with the arena kept. -> {"epoch", "pid"}."""


class AdminShutdown(Call, tag="admin.shutdown"):
    """Stop. With `keep`, the holder keeps the arena for `hold_seconds`. -> {"epoch", "pid"}."""

    keep: bool = False


CallRequest = (
    Describe | Prefetch | Fetch | Remove | Corrupt | Clear | Flush | Events | Stats
    | AdminStatus | AdminInspect | AdminNamespaces | AdminVerify | AdminRestart | AdminShutdown
)  # fmt: skip
ADMIN_CALLS = (
    AdminStatus, AdminInspect, AdminNamespaces, AdminVerify, AdminRestart, AdminShutdown
)  # fmt: skip
PEER_CALLS = (Describe, Prefetch, Corrupt)  # what a peer may ask for, besides Stats

_encoder = msgspec.msgpack.Encoder()
_hello = msgspec.msgpack.Decoder(Hello)
_greeting: msgspec.msgpack.Decoder[Welcome | Challenge] = msgspec.msgpack.Decoder(
    Welcome | Challenge
)
_auth = msgspec.msgpack.Decoder(Auth)
_call: msgspec.msgpack.Decoder[CallRequest] = msgspec.msgpack.Decoder(CallRequest)
_value = msgspec.msgpack.Decoder()

_Decoded = TypeVar("_Decoded")


def encode(value: Any) -> bytes:
    """Return the msgpack of a message, or of the value that answers a CALL."""
    return _encoder.encode(value)


def _decode(decoder: msgspec.msgpack.Decoder[_Decoded], body: bytes) -> _Decoded:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise IncompatibleError(f"not a message of protocol {VERSION}: {error}") from error


def decode_hello(body: bytes) -> Hello:
    return _decode(_hello, body)


def decode_greeting(body: bytes) -> Welcome | Challenge:
    """The reply to a Hello. The reply to an Auth is a Welcome."""
    return _decode(_greeting, body)


def decode_auth(body: bytes) -> Auth:
    return _decode(_auth, body)


def decode_call(body: bytes) -> CallRequest:
    return _decode(_call, body)


def decode_value(body: bytes) -> Any:
    """The reply to a CALL: plain values."""
    return _decode(_value, body)
