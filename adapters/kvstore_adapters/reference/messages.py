"""What the router and its worker processes say to each other, and how: frames of JSON.

A frame is a 4-byte little-endian length and a JSON object. The socket is one end of a pair that the
router made, so no one else can speak on it; lengths are capped all the same. KV never goes this
way.
"""

from __future__ import annotations

import socket
import struct
from typing import Any, Generic, TypeVar

import msgspec

from kvstore import IncompatibleError

from .counters import TransferCounters
from .scheduler import WorkerSettings

FRAME_BYTES_MAX = 64 << 20
_LENGTH = struct.Struct("<I")


class Message(msgspec.Struct, forbid_unknown_fields=True):
    pass


class ModelSource(Message):
    """A checkpoint directory, or else a random model of a named size."""

    directory: str | None = None
    size: str = "small"
    seed: int = 0


# --- to a worker


class Setup(Message, tag="setup"):
    """`revision` sets the worker's blocks apart from those of the same model elsewhere."""

    model: ModelSource
    settings: WorkerSettings
    revision: str = ""


class Attach(Message, tag="attach"):
    """Connect to the store at `address`; None: work without one."""

    address: str | None
    read: bool = True
    write: bool = True
    layerwise: bool = False


class Submit(Message, tag="submit"):
    request_id: str
    prompt_token_ids: list[int]
    max_new_tokens: int
    output_token_ids: list[int]
    stop_token_ids: list[int]


class Cancel(Message, tag="cancel"):
    request_id: str


class Report(Message, tag="report"):
    pass


ToWorker = Setup | Attach | Submit | Cancel | Report

# --- from a worker


class Ready(Message, tag="ready"):
    """The model is loaded: what its blocks are."""

    model: str
    revision: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str
    vocab_size: int
    end_token_ids: list[int]


class Attached(Message, tag="attached"):
    pass


class NewToken(Message):
    request_id: str
    token_id: int
    finish_reason: str | None  # "stop" or "length" with the last one
    cached_tokens: int  # with the last one: came from the store


class Tokens(Message, tag="tokens"):
    """The tokens of one step, at a time of the machine's monotonic clock."""

    at_s: float
    tokens: list[NewToken]


class Refused(Message, tag="refused"):
    request_id: str
    reason: str


class Counters(Message, tag="counters"):
    """`reaches_store`: a store answers it now, or there is none."""

    counters: TransferCounters
    reaches_store: bool


class Failed(Message, tag="failed"):
    """The worker cannot start. `wrong_setting`: because of what it was told."""

    reason: str
    wrong_setting: bool


FromWorker = Ready | Attached | Tokens | Refused | Counters | Failed

_T = TypeVar("_T")


def frame(message: object) -> bytes:
    body = msgspec.json.encode(message)
    return _LENGTH.pack(len(body)) + body


class Frames(Generic[_T]):
    """Messages of one type out of a byte stream.

    Raises:
        IncompatibleError: what arrived is no such message.
    """

    def __init__(self, kind: Any) -> None:
        self._decoder: msgspec.json.Decoder[_T] = msgspec.json.Decoder(kind)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[_T]:
        """The messages that are complete with these bytes."""
        self._buffer += data
        messages = []
        begin = 0
        while len(self._buffer) - begin >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, begin)
            if length > FRAME_BYTES_MAX:
                raise IncompatibleError(f"frame of {length} bytes, at most {FRAME_BYTES_MAX}")
            end = begin + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(self._decode(bytes(self._buffer[begin + _LENGTH.size : end])))
            begin = end
        del self._buffer[:begin]
        return messages

    def _decode(self, body: bytes) -> _T:
        try:
            return self._decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise IncompatibleError(f"not a message of this protocol: {error}") from error

    def receive(self, connection: socket.socket) -> list[_T] | None:
        """Read once; None at the end of the stream."""
        data = connection.recv(1 << 18)
        return self.feed(data) if data else None
