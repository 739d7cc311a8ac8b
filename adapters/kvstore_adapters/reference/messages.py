"""What the router and its worker processes say to each other, and how: frames of JSON.

A frame is a 4-byte little-endian length and a JSON object. The socket is one end of a pair that the
router made, so no one else can speak on it; lengths are capped all the same. KV never goes this
way, but the control messages of a hand-off do: the router passes them on from worker to worker.
"""

from __future__ import annotations

import socket
import struct
from typing import Any, Generic, TypeVar

import msgspec

from kvstore import ConfigError, IncompatibleError
from kvstore.transport import MOVERS
from kvstore.transport.handoff import CODECS, Direction, HandoffCounters, HandoffMessage

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


class HandoffSetup(Message):
    """How workers hand off KV.

    listen: where tcp and ucx listen, of a host that the other workers reach.
    codec: "none", or a lossy one that encodes it on the wire: tokens may differ then.
    timeout_s: a peer that gives no sign for so long is given up.
    wait_s: for so long a decode worker waits for what is missing when the prefill is done.
    lease_s: for so long, at most, a prefill worker keeps pages for a decode worker.
    """

    direction: str = "push"
    transport: str = "auto"
    listen: str = "127.0.0.1"
    codec: str = "none"
    timeout_s: float = 2.0
    wait_s: float = 10.0
    lease_s: float = 120.0

    def __post_init__(self) -> None:
        for name, choices in (
            ("direction", tuple(each.value for each in Direction)),
            ("transport", ("auto", *MOVERS)),
            ("codec", ("none", *CODECS)),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}: {getattr(self, name)!r} is not one of {', '.join(choices)}"
                )
        for name in ("timeout_s", "wait_s", "lease_s"):
            if not 0 < getattr(self, name) <= 3600:
                raise ConfigError(f"{name}: {getattr(self, name)} is not between 0 and 3600")


# --- to a worker


class Setup(Message, tag="setup"):
    """`revision` sets the worker's blocks apart from those of the same model elsewhere."""

    model: ModelSource
    settings: WorkerSettings
    revision: str = ""


class Attach(Message, tag="attach"):
    """Connect to the store at `address`; None: work without one. `handoff`: take part in them."""

    address: str | None
    handoff: HandoffSetup | None = None
    read: bool = True
    write: bool = True
    layerwise: bool = False


class Submit(Message, tag="submit"):
    """`send_as`: hand the prompt's blocks off, under this name."""

    request_id: str
    prompt_token_ids: list[int]
    max_new_tokens: int
    output_token_ids: list[int]
    stop_token_ids: list[int]
    send_as: str = ""


class Prepare(Message, tag="prepare"):
    """This request is prefilled elsewhere; its blocks come as hand-off `receive_as`, and Submit
    comes when its first token is known.
    """

    request_id: str
    prompt_token_ids: list[int]
    max_new_tokens: int
    receive_as: str


class Relay(Message, tag="relay"):
    """A message of a hand-off, either way: from one worker, for the other one."""

    handoff_id: str
    message: HandoffMessage


class PeerLost(Message, tag="peer-lost"):
    """The process at the other end of this hand-off is dead."""

    handoff_id: str


class Cancel(Message, tag="cancel"):
    request_id: str


class Report(Message, tag="report"):
    pass


ToWorker = Setup | Attach | Submit | Prepare | Relay | PeerLost | Cancel | Report

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
    handoff: HandoffCounters


class Failed(Message, tag="failed"):
    """The worker cannot start. `wrong_setting`: because of what it was told."""

    reason: str
    wrong_setting: bool


FromWorker = Ready | Attached | Tokens | Refused | Relay | Counters | Failed

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
