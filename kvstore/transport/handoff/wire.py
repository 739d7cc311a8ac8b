"""The lossy codecs on the wire: a layer of a block is encoded into a staging region before it is
sent, and decoded out of one after it has arrived.

Only for whoever asks for it: tokens may differ from those of KV that was not encoded. A layer of a
block is encoded as a block of one layer, so its length is the same for every one.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvstore.block import BlockSpec
from kvstore.codec import get_codec
from kvstore.errors import ConfigError
from kvstore.transport.handoff.messages import WireInfo

U64 = npt.NDArray[np.uint64]
CODECS = ("int8", "fp8")


class Slots:
    """Runs of equal slots; first fit. Thread-safe."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = [(0, count)] if count else []  # (first, length), sorted, never adjacent
        self._lock = threading.Lock()

    def take(self, length: int) -> int | None:
        """The first slot of a run of `length`; None: there is none."""
        with self._lock:
            for index, (first, room) in enumerate(self._free):
                if room >= length:
                    rest = [(first + length, room - length)] if room > length else []
                    self._free[index : index + 1] = rest
                    return first
        return None

    def give(self, first: int, length: int) -> None:
        with self._lock:
            merged: list[tuple[int, int]] = []
            for begin, room in sorted([*self._free, (first, length)]):
                assert not merged or sum(merged[-1]) <= begin, "slots given back twice"
                if merged and sum(merged[-1]) == begin:
                    merged[-1] = (merged[-1][0], merged[-1][1] + room)
                else:
                    merged.append((begin, room))
            self._free = merged


class Wire:
    """A codec and the slots of its staging memory. Thread-safe.

    Args:
        spec: of whole blocks.
        staging: of one registered region, aligned to 4 KiB.
        region_id: of that region.

    Raises:
        ConfigError: no codec of the wire, or no room for one slot.
    """

    def __init__(
        self, codec: str, spec: BlockSpec, staging: npt.NDArray[np.uint8], region_id: int
    ) -> None:
        if codec not in CODECS:
            raise ConfigError(f"codec: {codec!r} is not one of {', '.join(CODECS)}")
        self.codec = codec
        self._spec = replace(spec, num_layers=1)
        self._codec = get_codec(codec, self._spec)
        self._staging = staging
        self.region_id = region_id
        self.stride = self._codec.max_encoded_bytes(self._spec.block_bytes, self._spec)
        self.slots = Slots(len(staging) // self.stride)
        if not self.slots.count:
            raise ConfigError(f"staging: {len(staging)} bytes do not hold one of {self.stride}")
        # Every layer's encoded length is the same; a layer of zeros tells it.
        zeros = np.zeros(self._spec.block_bytes, np.uint8)
        address = np.asarray([zeros.ctypes.data], np.uint64)
        probe = self._codec.encode(address, self._spec.block_bytes, self._spec)
        self.slot_bytes = int(probe.lengths[0])

    def info(self, first_slot: int) -> WireInfo:
        """For a peer, whose slot 0 is our `first_slot`."""
        return WireInfo(
            self.codec, self.region_id, first_slot * self.stride, self.stride, self.slot_bytes
        )

    def suits(self, theirs: WireInfo | None) -> bool:
        return (
            theirs is not None
            and theirs.codec == self.codec
            and theirs.slot_bytes == self.slot_bytes
            and 0 <= theirs.offset < 1 << 62
            and self.slot_bytes <= theirs.stride < 1 << 40
        )

    def addresses(self, first_slot: int, count: int) -> U64:
        steps = np.arange(first_slot, first_slot + count, dtype=np.uint64) * np.uint64(self.stride)
        return steps + np.uint64(self._staging.ctypes.data)

    def encode(self, raw: U64) -> int | None:
        """Encode the layers at these addresses into consecutive slots, and return the first; None
        where there is no room, or the codec refuses one: they are to be sent as they are."""
        first = self.slots.take(len(raw))
        if first is None:
            return None
        buffer = self._staging[first * self.stride : (first + len(raw)) * self.stride]
        encoded = self._codec.encode(raw, self._spec.block_bytes, self._spec, buffer)
        if not encoded.ok.all():
            self.slots.give(first, len(raw))
            return None
        return first

    def decode(self, encoded: U64, raw: U64) -> bool:
        """False when one of them cannot be decoded."""
        lengths = np.full(len(encoded), self.slot_bytes, np.uint64)
        size = self._spec.block_bytes
        return bool(self._codec.decode(encoded, lengths, raw, size, self._spec).all())
