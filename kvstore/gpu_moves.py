"""What a GpuTier has under way: loads and puts, from what they take to what becomes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.block import BlockHashes
from kvstore.control import RESERVED, Ack, Control, Granted, Reserved
from kvstore.errors import GpuError
from kvstore.gpu.blocks import DeviceBlocks
from kvstore.gpu.copies import ArenaCopies
from kvstore.gpu.device import Addresses, BlockIds, Device, Event
from kvstore.gpu.registration import Registrations
from kvstore.gpu.slots import Slots, SlotTable
from kvstore.puts import finish_put, not_stored
from kvstore.transfer import Transfer, TransferResult, join


@dataclass(frozen=True)
class Pool:
    """Memory of a GPU, cut into slots, between an engine's pages and a store.

    `lock` guards the table, and the order of what is enqueued.
    """

    control: Control
    device: Device
    table: SlotTable
    address: int
    stride: int  # from slot to slot
    block_bytes: int
    out: int  # the stream to the arena
    copies: ArenaCopies
    registrations: Registrations
    lock: threading.Lock

    def places(self, slots: Slots) -> Addresses:
        places: Addresses = np.uint64(self.address) + slots.astype(np.uint64) * np.uint64(
            self.stride
        )
        return places

    def pieces(self, chain: BlockHashes) -> Iterator[BlockHashes]:
        """Parts that the control takes at once."""
        size = self.control.piece_blocks or max(len(chain), 1)
        for begin in range(0, len(chain), size):
            yield chain[begin : begin + size]


class LoadMove:
    """One load. `finish` is called once, when all that was enqueued has run, or failed."""

    def __init__(
        self,
        pool: Pool,
        chain: BlockHashes,
        slots: Slots,
        granted: list[tuple[BlockHashes, Granted]],
    ) -> None:
        self._pool = pool
        self._chain = chain
        self._slots = slots  # in the pool already
        self._granted = granted  # of the blocks after those
        self._counts: list[int] = []  # how many blocks of each grant were enqueued
        self._fills: list[Slots] = []  # the slots that those fill; empty where none could be had

    def acquire(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        rest = self._chain[len(self._slots) :]
        for part in self._pool.pieces(rest):
            left = max(0.0, deadline - time.monotonic())
            control = self._pool.control
            found = control.acquire(part, control.terms.lease_seconds, left)
            if found.lease:
                self._granted.append((part, found))
            if len(found.offsets) < len(part):
                break

    def enqueue(self, blocks: DeviceBlocks, ids: BlockIds, stream: int) -> None:
        """REQUIRES: the pool's lock."""
        pool, device, table = self._pool, self._pool.device, self._pool.table
        for event in table.fill_events(self._slots):
            device.wait_event(stream, event)
        at = len(self._slots)
        device.scatter(blocks.prepared, ids[:at], pool.places(self._slots), stream)
        for part, found in self._granted:
            host = pool.registrations.of(found.arena)
            addresses = found.offsets + np.uint64(found.address)
            count = self._num_sound(part, found, addresses)
            addresses, own = addresses[:count], ids[at : at + count]
            fills = self._take_slots(part[:count])
            self._counts.append(count)
            self._fills.append(fills)
            if len(fills):
                for event in table.use_events(fills):
                    device.wait_event(stream, event)
                places = pool.places(fills)
                sizes = np.full(count, pool.block_bytes, np.uint64)
                host.require(addresses, pool.block_bytes)
                pool.copies.copy(host, addresses, places, sizes, stream, is_to_host=False)
                device.scatter(blocks.prepared, own, places, stream)
            else:
                pool.copies.from_host(blocks, own, host, addresses, stream)
            at += count
            if count < len(part):
                break

    def _num_sound(self, part: BlockHashes, found: Granted, addresses: Addresses) -> int:
        """How many leading blocks may be used; all, unless the store wants them verified."""
        terms = self._pool.control.terms
        if not terms.verify_always:
            return len(addresses)
        sums = np.empty(len(addresses), np.uint64)
        _native.checksum_blocks(addresses, self._pool.block_bytes, sums, terms.threads)
        count = _leading(sums == found.checksums)
        if count < _leading(_still_there(found)):
            self._pool.control.report_corrupt(part[count])
        return count

    def _take_slots(self, part: BlockHashes) -> Slots:
        """A slot for each block, or none at all."""
        table = self._pool.table
        taken = table.reserve(part)
        if len(taken.new) == len(part):
            return taken.new
        table.abort(taken.new, None)
        return taken.new[:0]

    def finish(self, error: GpuError | None) -> Transfer:
        pool, table = self._pool, self._pool.table
        held = [
            0 if error else min(_leading(_still_there(found)), count)
            for (_, found), count in zip(self._granted, self._counts, strict=False)
        ]
        loaded = 0 if error else len(self._slots)
        is_leading = True
        for count, good in zip(self._counts, held, strict=True):
            loaded += good if is_leading else 0
            is_leading = is_leading and good == count
        with pool.lock:
            for fills, good in zip(self._fills, held, strict=True):
                # What was filled when the lease had ended is another block's bytes.
                table.commit(fills[:good], None)
                table.abort(fills[good:], None)
            table.unuse(map(int, self._slots), None)
        for _, found in self._granted:
            pool.control.release(found.lease)
        return Transfer(TransferResult(loaded, num_missed=len(self._chain) - loaded))

    def finish_failed(self, error: GpuError | None) -> Transfer:
        return self.finish(error or GpuError("the load could not be enqueued"))


class PutMove:
    """One put; see `LoadMove`."""

    def __init__(self, pool: Pool, chain: BlockHashes, ack: Ack) -> None:
        self._pool = pool
        self._chain = chain
        self._ack: Ack = ack
        self._slots: Slots = np.zeros(0, np.int64)  # of each block; -1: none of ours
        self._filled: Event | None = None
        self._reserved: list[tuple[BlockHashes, Reserved, bool]] = []  # True: ours to write

    def fill_pool(self, blocks: DeviceBlocks, ids: BlockIds, stream: int) -> None:
        """REQUIRES: the pool's lock."""
        pool, device, table = self._pool, self._pool.device, self._pool.table
        taken = table.reserve(self._chain)
        try:
            for event in table.use_events(taken.new):
                device.wait_event(stream, event)
            own = ids[taken.statuses == RESERVED]
            device.gather(blocks.prepared, own, pool.places(taken.new), stream)
            self._filled = device.record(stream)
        except BaseException:
            # Something may be enqueued: whoever gets the slots next has to wait for it.
            table.abort(taken.new, device.record(stream))
            raise
        table.hold(taken.new)  # until they are in the arena
        table.commit(taken.new, self._filled)
        self._slots = taken.slots

    def reserve(self) -> None:
        for part in self._pool.pieces(self._chain):
            found = self._pool.control.reserve(part)
            is_ours = bool(found.reservation) and (found.writers is None or found.writers.begin())
            self._reserved.append((part, found, is_ours))

    def enqueue(self, blocks: DeviceBlocks, ids: BlockIds, stream: int) -> None:
        """REQUIRES: the pool's lock."""
        pool, device = self._pool, self._pool.device
        if self._filled is not None:
            device.wait_event(pool.out, self._filled)
        at = 0
        for part, found, is_ours in self._reserved:
            here = slice(at, at + len(part))
            at += len(part)
            if not is_ours:
                continue
            host = pool.registrations.of(found.arena)
            addresses = found.offsets + np.uint64(found.address)
            is_wanted = found.statuses == RESERVED
            is_pooled = is_wanted & (self._slots[here] >= 0)
            others = is_wanted & ~is_pooled
            if others.any():
                pool.copies.to_host(blocks, ids[here][others], host, addresses[others], stream)
            ours, places = addresses[is_pooled], pool.places(self._slots[here][is_pooled])
            sizes = np.full(len(ours), pool.block_bytes, np.uint64)
            host.require(ours, pool.block_bytes)
            pool.copies.copy(host, ours, places, sizes, pool.out, is_to_host=True)

    def finish(self, error: GpuError | None) -> Transfer:
        pool = self._pool
        with pool.lock:
            pool.table.unuse([int(slot) for slot in self._slots if slot >= 0], None)
        done: list[Transfer] = []
        for part, found, is_ours in self._reserved:
            addresses = (found.offsets + np.uint64(found.address))[found.statuses == RESERVED]
            sums = np.empty(len(addresses), np.uint64)
            if is_ours:
                if error is None:
                    threads = pool.control.terms.threads
                    _native.checksum_blocks(addresses, pool.block_bytes, sums, threads)
                if found.writers is not None:
                    found.writers.end()
            if error is not None or (found.reservation and not is_ours):
                if found.reservation:
                    pool.control.abort(found.reservation)
                done.append(Transfer(not_stored(found.statuses)))
            else:
                done.append(
                    finish_put(
                        pool.control, found.reservation, sums, part, found.statuses, self._ack
                    )
                )
        return join(done) if done else Transfer(TransferResult(0))

    def finish_failed(self, error: GpuError | None) -> Transfer:
        return self.finish(error or GpuError("the put could not be enqueued"))


def _still_there(granted: Granted) -> npt.NDArray[np.bool_]:
    words = granted.arena.view(np.uint64)
    there: npt.NDArray[np.bool_] = (
        words[granted.header_offsets >> np.uint64(3)] == granted.sequences
    )
    return there


def _leading(good: npt.NDArray[np.bool_]) -> int:
    bad = np.flatnonzero(~good)
    return int(bad[0]) if len(bad) else len(good)
