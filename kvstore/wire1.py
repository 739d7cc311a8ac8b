"""The control protocol: small framed messages on a Unix stream socket.

    frame:  magic "KVS1" | length u32 little-endian | msgpack of one message below

A client says Hello first; the reply to its first connection carries the arena's file descriptor
(SCM_RIGHTS). Then each request gets one reply, in order. Payload bytes never travel here: both
sides map the arena. Lengths are capped before anything is allocated; messages are typed, and
nothing in them is code.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

import msgspec

from kvstore.errors import IncompatibleError, PeerUnavailableError

VERSION = 1
MAGIC = b"KVS1"
HEADER = struct.Struct("<4sI")
FRAME_BYTES_MAX = 64 << 20  # 2 million hashes


class Message(msgspec.Struct, tag_field="op", forbid_unknown_fields=True):
    """Base of all messages."""


class Chain(msgspec.Struct, array_like=True):
    """BlockHashes: packed 32-byte hashes and their lineage."""

    hashes: bytes
    start: int
    parent: bytes | None


class Hello(Message, tag="hello"):
    version: int
    namespace: dict[str, Any]  # Namespace.describe()
    client: bytes = b""  # from the first Welcome, so that more connections are the same client


class Welcome(Message, tag="welcome"):
    client: bytes
    arena_bytes: int
    verify_always: bool
    threads: int
    lease_seconds: float


class Match(Message, tag="match"):
    chain: Chain


class Residency(Message, tag="residency"):
    chain: Chain


class Describe(Message, tag="describe"):
    chain: Chain


class WaitFor(Message, tag="wait_for"):
    chain: Chain
    want: int
    timeout: float


class Acquire(Message, tag="acquire"):
    chain: Chain
    ttl: float | None
    timeout: float


class Release(Message, tag="release"):
    lease: int


class Reserve(Message, tag="reserve"):
    chain: Chain


class Commit(Message, tag="commit"):
    reservation: int
    checksums: bytes
    chain: Chain
    ack: str


class Abort(Message, tag="abort"):
    reservation: int


class Prefetch(Message, tag="prefetch"):
    chain: Chain


class Remove(Message, tag="remove"):
    chain: Chain


class Corrupt(Message, tag="corrupt"):
    block_hash: bytes


class Clear(Message, tag="clear"):
    pass


class Flush(Message, tag="flush"):
    timeout: float


class Events(Message, tag="events"):
    pass


class Stats(Message, tag="stats"):
    pass


class Value(Message, tag="value"):
    """A reply of one value."""

    value: int | float | bool | str | dict[str, int | float] | None


class Packed(Message, tag="packed"):
    """A reply of packed rows."""

    data: bytes


class Grants(Message, tag="grants"):
    """Reply to Acquire: packed u64 arrays."""

    lease: int
    offsets: bytes
    header_offsets: bytes
    sequences: bytes
    checksums: bytes


class Slots(Message, tag="slots"):
    """Reply to Reserve."""

    reservation: int
    statuses: bytes
    offsets: bytes


class Failure(Message, tag="failure"):
    """The request failed; `error` is the name of a class in kvstore.errors, or of a builtin."""

    error: str
    message: str


Request = (
    Hello | Match | Residency | Describe | WaitFor | Acquire | Release | Reserve | Commit | Abort
    | Prefetch | Remove | Corrupt | Clear | Flush | Events | Stats
)  # fmt: skip
Reply = Welcome | Value | Packed | Grants | Slots | Failure

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)


def send(connection: socket.socket, message: Message, fd: int | None = None) -> None:
    """Send one message, with a file descriptor when given."""
    body = _encoder.encode(message)
    frame = HEADER.pack(MAGIC, len(body)) + body
    if fd is None:
        connection.sendall(frame)
        return
    sent = socket.send_fds(connection, [frame], [fd])
    connection.sendall(frame[sent:])


def receive_request(connection: socket.socket) -> Request | None:
    """Return the next request, None when the client has gone.

    Raises:
        IncompatibleError: what arrived is not a request of this protocol.
    """
    body = _receive_body(connection)
    if body is None:
        return None
    request: Request = _decode(_requests, body)
    return request


def receive_reply(connection: socket.socket) -> Reply:
    """Return the reply.

    Raises:
        PeerUnavailableError: the daemon has gone.
        IncompatibleError: what arrived is not a reply of this protocol.
    """
    body = _receive_body(connection)
    if body is None:
        raise PeerUnavailableError("the daemon closed the connection")
    reply: Reply = _decode(_replies, body)
    return reply


def receive_welcome(connection: socket.socket) -> tuple[Reply, int | None]:
    """Return the first reply of a connection and the descriptor that came with it."""
    first, fds, _, _ = socket.recv_fds(connection, HEADER.size, 1)
    fd = fds[0] if fds else None
    header = first + (_receive_exactly(connection, HEADER.size - len(first)) or b"")
    if len(header) < HEADER.size:
        raise PeerUnavailableError("the daemon closed the connection")
    body = _receive_exactly(connection, _length(header))
    if body is None:
        raise PeerUnavailableError("the daemon closed the connection")
    return _decode(_replies, body), fd


def _decode(decoder: msgspec.msgpack.Decoder[Any], body: bytes | bytearray) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise IncompatibleError(f"not a message of protocol {VERSION}: {error}") from error


def _length(header: bytes | bytearray) -> int:
    magic, length = HEADER.unpack(header)
    if magic != MAGIC:
        raise IncompatibleError(f"not a kvstore peer: frame starts with {bytes(magic)!r}")
    if length > FRAME_BYTES_MAX:
        raise IncompatibleError(f"frame of {length} bytes; at most {FRAME_BYTES_MAX} are allowed")
    return int(length)


def _receive_body(connection: socket.socket) -> bytearray | None:
    header = _receive_exactly(connection, HEADER.size)
    return None if header is None else _receive_exactly(connection, _length(header))


def _receive_exactly(connection: socket.socket, count: int) -> bytearray | None:
    """Return `count` bytes; None when the peer closed first, in the middle of a frame or not."""
    data = bytearray(count)
    view = memoryview(data)
    while view:
        received = connection.recv_into(view)
        if received == 0:
            return None
        view = view[received:]
    return data
