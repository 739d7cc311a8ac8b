"""Blocks between an engine's pages on a device and registered host memory: the arena.

Three ways, of which the layout decides (`Way.of`):

* PIECES: a block is few, large pieces: each is copied by the DMA engines as it lies.
* STAGED: a block is many small pieces: one launch gathers a batch into memory of the device, from
  where whole blocks are copied by the DMA engines; and the other way round.
* DIRECT: the kernel itself reads or writes host memory, without a stage. It keeps processors of the
  GPU busy for as long as the bus takes, so it is only used when asked for.

Everything is enqueued on the caller's stream; nothing waits.
"""

from __future__ import annotations

import threading
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore.errors import ConfigError
from kvstore.gpu.blocks import DeviceBlocks
from kvstore.gpu.device import Addresses, BlockIds, Device, Event, Memory, RunTable
from kvstore.gpu.registration import HostRegistration

STAGE_BYTES: Final = 64 << 20
_PIECE_BYTES_MIN: Final = 256 << 10  # below, starting a copy costs more than gathering
_STAGES: Final = 2  # so that two streams need not wait for one another


class Way(Enum):
    PIECES = "pieces"
    STAGED = "staged"
    DIRECT = "direct"

    @classmethod
    def of(cls, table: RunTable) -> Way:
        """The best for a layout."""
        smallest = int(table.rows["piece_bytes"].min())
        is_whole = int(table.rows["count"].sum()) == 1
        return cls.PIECES if is_whole or smallest >= _PIECE_BYTES_MIN else cls.STAGED


class _Stage:
    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.event: Event | None = None  # after which nobody uses it


class ArenaCopies:
    """Thread safety: all methods may be called from any thread."""

    def __init__(self, device: Device, stage_bytes: int = STAGE_BYTES) -> None:
        """`stage_bytes`: of device memory, in two halves; taken when first needed."""
        self._device = device
        self._half_bytes = stage_bytes // _STAGES
        self._lock = threading.Lock()  # guards all below
        self._stages: list[_Stage] = []
        self._turn = 0

    def to_host(
        self,
        blocks: DeviceBlocks,
        block_ids: object,
        host: HostRegistration,
        addresses: Addresses,
        stream: int,
        *,
        payload: tuple[int, int] | None = None,
        way: Way | None = None,
    ) -> None:
        """Canonical block at addresses[i] <- engine block block_ids[i].

        Args:
            blocks: the engine's.
            block_ids: shape (n,).
            host: has the addresses.
            addresses: of whole blocks, shape (n,).
            stream: on which the blocks were computed, or that waits for it.
            payload: only the bytes [begin, end) of each block.
            way: None: the best.

        Raises:
            ConfigError: addresses outside of `host`, or it is read-only.
            IndexError, TypeError, ValueError: block ids are wrong.
            GpuError: the device refused.
        """
        if host.read_only:
            raise ConfigError("addresses: the memory is mapped read-only")
        ids = blocks.check_ids(block_ids, distinct=False)
        self._move(blocks, ids, host, addresses, stream, payload, way, True)

    def from_host(
        self,
        blocks: DeviceBlocks,
        block_ids: object,
        host: HostRegistration,
        addresses: Addresses,
        stream: int,
        *,
        payload: tuple[int, int] | None = None,
        way: Way | None = None,
    ) -> None:
        """Engine block block_ids[i] <- canonical block at addresses[i].

        The host memory must hold the bytes already, and until the event that the caller records
        behind this. Otherwise as `to_host`.
        """
        blocks.require_writable()
        ids = blocks.check_ids(block_ids, distinct=True)
        self._move(blocks, ids, host, addresses, stream, payload, way, False)

    def _move(
        self,
        blocks: DeviceBlocks,
        ids: BlockIds,
        host: HostRegistration,
        addresses: Addresses,
        stream: int,
        payload: tuple[int, int] | None,
        way: Way | None,
        is_to_host: bool,
    ) -> None:
        if len(ids) != len(addresses):
            raise ConfigError(f"addresses: {len(addresses)} for {len(ids)} blocks")
        host.require(addresses, blocks.block_bytes)
        table = blocks.prepared.table
        part = payload or (0, blocks.block_bytes)
        way = way or Way.of(table)
        if way is Way.PIECES:
            theirs, offsets, sizes = pieces_of(table, ids, part)
            ours = (addresses[:, None] + offsets).ravel()
            lengths = np.tile(sizes, len(ids))
            self.copy(host, ours, theirs, lengths, stream, is_to_host=is_to_host)
        elif way is Way.DIRECT:
            launch = self._device.gather if is_to_host else self._device.scatter
            launch(blocks.prepared, ids, addresses, stream, part)
        else:
            self._through_stage(blocks, ids, host, addresses, stream, part, is_to_host)

    def copy(
        self,
        host: HostRegistration,
        ours: Addresses,
        theirs: Addresses,
        sizes: Addresses,
        stream: int,
        *,
        is_to_host: bool,
    ) -> None:
        """Copy pieces between `ours`, in `host`, and `theirs`, in the device's memory."""
        ours, theirs, sizes = host.cut(ours, theirs, sizes)
        to, source = (ours, theirs) if is_to_host else (theirs, ours)
        self._device.copy(to, source, sizes, stream, is_from_host=not is_to_host)

    def _through_stage(
        self,
        blocks: DeviceBlocks,
        ids: BlockIds,
        host: HostRegistration,
        addresses: Addresses,
        stream: int,
        part: tuple[int, int],
        is_to_host: bool,
    ) -> None:
        # Rows keep the alignment of the payload: a row of part of a block begins at that part.
        size = part[1] - part[0]
        row = -(-size // 16) * 16
        with self._lock:
            if not self._stages:
                length = max(self._half_bytes, blocks.block_bytes + 16)
                for _ in range(_STAGES):
                    self._stages.append(_Stage(self._device.allocate(length)))
            if self._stages[0].memory.num_bytes < row:
                raise ConfigError(f"blocks: {size} bytes are more than a stage has")
            count = self._stages[0].memory.num_bytes // row
            for begin in range(0, len(ids), count):
                some = slice(begin, begin + count)
                self._one_batch(blocks, ids[some], host, addresses[some], stream, part, is_to_host)

    def _one_batch(
        self,
        blocks: DeviceBlocks,
        ids: BlockIds,
        host: HostRegistration,
        addresses: Addresses,
        stream: int,
        part: tuple[int, int],
        is_to_host: bool,
    ) -> None:
        stage = self._stages[self._turn]
        self._turn = (self._turn + 1) % _STAGES
        size = part[1] - part[0]
        row = -(-size // 16) * 16
        rows = np.arange(len(ids), dtype=np.uint64) * np.uint64(row)
        staged = rows + np.uint64(stage.memory.address)
        ours = addresses + np.uint64(part[0])
        sizes = np.full(len(ids), size, np.uint64)
        # A kernel is given where the block would begin of which it copies a part.
        origin = staged - np.uint64(part[0])
        if stage.event is not None:
            self._device.wait_event(stream, stage.event)
        try:
            if is_to_host:
                self._device.gather(blocks.prepared, ids, origin, stream, part)
                self.copy(host, ours, staged, sizes, stream, is_to_host=True)
            else:
                self.copy(host, ours, staged, sizes, stream, is_to_host=False)
                self._device.scatter(blocks.prepared, ids, origin, stream, part)
        finally:
            stage.event = self._device.record(stream)

    def close(self) -> None:
        """REQUIRES: nothing is under way."""
        with self._lock:
            stages, self._stages = self._stages, []
        for stage in stages:
            stage.memory.close()


def pieces_of(
    table: RunTable, ids: BlockIds, part: tuple[int, int]
) -> tuple[Addresses, Addresses, Addresses]:
    """The pieces of payload bytes [begin, end): their addresses in each of the blocks, one block
    after the other; their offsets in the payload; and their sizes, the same for each block."""
    rows = table.rows
    if len(table.addresses):
        firsts = table.addresses[ids]
    else:
        strides = rows["block_stride"].astype(np.int64)
        firsts = rows["base"] + (ids[:, None] * strides).astype(np.uint64)
    runs = np.repeat(np.arange(len(rows)), rows["count"])
    starts = np.concatenate(([0], np.cumsum(rows["count"])[:-1]))
    index = np.arange(len(runs)) - np.repeat(starts, rows["count"])
    engine = (index * rows["engine_stride"][runs]).astype(np.uint64)
    sizes = rows["piece_bytes"][runs].astype(np.int64)
    offsets = rows["block_offset"][runs].astype(np.int64) + index * sizes
    begins = np.maximum(offsets, part[0])
    lengths = np.minimum(offsets + sizes, part[1]) - begins
    chosen = lengths > 0
    skipped: npt.NDArray[np.uint64] = (begins - offsets).astype(np.uint64)
    addresses = (firsts[:, runs] + engine + skipped)[:, chosen]
    return (
        addresses.ravel(),
        begins[chosen].astype(np.uint64),
        lengths[chosen].astype(np.uint64),
    )
