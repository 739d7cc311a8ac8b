"""Hand-off of one request's KV from the process that computed it to the one that goes on with it.

By push or by pull, layer by layer, so that most of it has arrived when the last layer is computed.
`Sender` and `Receiver` are state machines without threads; `Exchange` drives those of one process.
"""

from kvstore.transport.handoff.exchange import Exchange, HandoffCounters, Incoming
from kvstore.transport.handoff.links import Links
from kvstore.transport.handoff.messages import (
    Computed,
    Ended,
    Failed,
    Grant,
    HandoffMessage,
    Layout,
    Offer,
    Ready,
    Stop,
    WireInfo,
)
from kvstore.transport.handoff.party import Direction, Party
from kvstore.transport.handoff.receiver import Receiver
from kvstore.transport.handoff.sender import Sender
from kvstore.transport.handoff.wire import CODECS, Wire

__all__ = [
    "CODECS",
    "Computed",
    "Direction",
    "Ended",
    "Exchange",
    "Failed",
    "Grant",
    "HandoffCounters",
    "HandoffMessage",
    "Incoming",
    "Layout",
    "Links",
    "Offer",
    "Party",
    "Ready",
    "Receiver",
    "Sender",
    "Stop",
    "Wire",
    "WireInfo",
]
