"""What agents must know of one another, in our words.

NIXL serializes its own descriptor lists by pickle; these go as msgpack, as no byte of a peer may
run code here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from kvstore import IncompatibleError

INFO_BYTES_MAX = 64 << 20
Kind = Literal["DRAM", "VRAM"]


class MemoryRange(msgspec.Struct, frozen=True):
    """Memory that an agent has registered. `device`: the GPU's number, 0 for DRAM."""

    address: int
    num_bytes: int
    device: int = 0
    kind: Kind = "DRAM"


class AgentInfo(msgspec.Struct, frozen=True):
    """An agent: its name, what NIXL says of it, and ranges that it lets others read and write.

    Whoever has this can read and write there: hand it on over authenticated channels only.
    """

    name: str
    metadata: bytes
    ranges: list[MemoryRange]

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @staticmethod
    def decode(data: bytes) -> AgentInfo:
        """
        Raises:
            IncompatibleError: it describes no agent.
        """
        if len(data) > INFO_BYTES_MAX:
            raise IncompatibleError(f"agent: {len(data)} bytes; at most {INFO_BYTES_MAX}")
        try:
            info = msgspec.msgpack.decode(data, type=AgentInfo)
        except msgspec.MsgspecError as error:
            raise IncompatibleError(f"agent: not a description of one: {error}") from error
        for memory in info.ranges:
            if not 0 < memory.address < memory.address + memory.num_bytes <= 1 << 63:
                raise IncompatibleError(f"agent: {info.name}: {memory} is no memory")
        return info


def ranges_of_blocks(
    base_addresses: Sequence[int],
    num_blocks: int,
    block_bytes: int | Sequence[int],
    *,
    device: int = 0,
    kind: Kind = "DRAM",
) -> list[MemoryRange]:
    """What an engine registers and tells its peers of: a base address for each layer or tensor,
    from where blocks of one size follow each other. Block i of layer j is at `i * block_bytes[j]`
    in range j.
    """
    sizes = (
        [block_bytes] * len(base_addresses) if isinstance(block_bytes, int) else list(block_bytes)
    )
    return [
        MemoryRange(address, num_blocks * size, device, kind)
        for address, size in zip(base_addresses, sizes, strict=True)
    ]
