"""What the two sides of a hand-off say to each other.

The caller's control channel carries these, in order, each way; it knows which hand-off they are of.
It must be authenticated: `endpoint` tells how to reach all registered memory of a process.

    push    receiver: Grant                     sender: Ready after each write ...      Ended
    pull    sender: Offer, Ready when readable ...     receiver: Stop when all is read  Ended
    either  receiver: Stop to give up;          sender: Failed as soon as it knows,     Ended

After Ended the sender's endpoint neither writes to the receiver's pages nor lets go of anything
that the receiver might still want: it is the sender's last message, and there always is one while
the sender lives.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from kvstore.transport.types import Natural


class _Message(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="kind"
):
    pass


class WireInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where encoded layers lie: slot i is `slot_bytes` at offset + i * stride of the region."""

    codec: str
    region_id: Natural
    offset: int
    stride: int
    slot_bytes: int


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a page's layers lie in a region: part j of a layer is `sizes[j]` bytes at
    offsets[layer][j] + page * stride.

    Both sides have the same number of layers and the same sizes; the rest is each one's own.
    """

    region_id: Natural
    stride: Natural
    sizes: list[int]
    offsets: list[list[int]]

    @property
    def num_layers(self) -> int:
        return len(self.offsets)

    @property
    def layer_bytes(self) -> int:
        return sum(self.sizes)


class Grant(_Message, frozen=True, tag="grant"):
    """Push: write block i into pages[i]; encoded ones into slot layer * len(pages) + i instead."""

    endpoint: bytes
    layout: Layout
    pages: list[int]
    wire: WireInfo | None = None


class Offer(_Message, frozen=True, tag="offer"):
    """Pull: what Ready says lies here."""

    endpoint: bytes
    layout: Layout
    wire: WireInfo | None = None


class Ready(_Message, frozen=True, tag="ready"):
    """A layer of consecutive blocks was written (push), or may be read (pull) from these places:
    pages, or slots where it is encoded.

    `checksums`: 64-bit little-endian XXH3 of each piece, all blocks of part 0 first. Encoded, a
    block is one piece.
    """

    layer: int
    first_block: int
    num_blocks: int
    checksums: bytes
    places: list[int] = []
    is_encoded: bool = False


class Computed(_Message, frozen=True, tag="computed"):
    """All layers of all blocks are computed. What comes after this the receiver waits for."""


class Failed(_Message, frozen=True, tag="failed"):
    """Nothing more comes. The pages are not settled before Ended."""

    reason: str


class Ended(_Message, frozen=True, tag="ended"):
    pass


class Stop(_Message, frozen=True, tag="stop"):
    """Send nothing more, and say when that is so. Pull: what was offered is not wanted any more."""

    reason: str = ""


ToSender: TypeAlias = Grant | Stop
ToReceiver: TypeAlias = Offer | Ready | Computed | Failed | Ended
HandoffMessage: TypeAlias = ToSender | ToReceiver
