"""Copies: how a client that maps no arena reads and writes blocks: through its landing.

What is read is checked on arrival; a block that fails is a miss, and the daemon is told. The
daemon's lease is held for as long as ours, so that what is leased stays in its DRAM here as there.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore._native import Connection
from kvstore.block import BlockHashes
from kvstore.client.landing import Landing
from kvstore.client.session import Session
from kvstore.control import NO_SPACE, RESERVED, Granted, Offsets, Reserved
from kvstore.errors import PeerUnavailableError

ACK_SECONDS = 60.0  # what a commit at a level above memory may take
_NONE = np.zeros(0, np.uint64)


class Copies:
    """The landing of one client, and what lies in it. Thread-safe."""

    def __init__(self, block_bytes: int, num_bytes: int) -> None:
        self._landing = Landing(block_bytes, num_bytes)
        self._block_bytes = block_bytes

    @property
    def piece_blocks(self) -> int:
        """How many blocks one call should take, so that two can be under way."""
        return max(1, self._landing.capacity // 2)

    @property
    def num_leases(self) -> int:
        return self._landing.num_held

    def nothing(self) -> Granted:
        return Granted(0, _NONE, _NONE, _NONE, _NONE, self._landing.memory, self._landing.address)

    def acquire(
        self, session: Session, hashes: BlockHashes, ttl: float | None, timeout: float, spent: float
    ) -> tuple[Granted, bool]:
        """Lease and fetch leading blocks; `spent` seconds of the time for it are gone already.

        Returns what arrived whole, and whether the block after that arrived damaged.
        """
        deadline = time.monotonic() - spent + timeout + session.timeout
        hashes = hashes[: self._landing.capacity]
        lease, _, _, _, checksums = session.ask(
            Connection.acquire,
            timeout - spent,
            -1.0 if ttl is None else ttl,
            timeout,
            0,
            hashes.array,
            hashes.start,
            hashes.parent,
        )
        if not lease:
            return self.nothing(), False
        landing = self._landing
        places = landing.take(len(checksums), deadline)
        num_good = 0
        try:
            if len(places):
                addresses = landing.offsets(places) + np.uint64(landing.address)
                left = max(0.0, deadline - time.monotonic() - session.timeout)
                session.ask(Connection.read, left, lease, 0, addresses, self._block_bytes)
                num_good = self._num_whole(addresses, checksums, session.terms.threads)
        finally:
            landing.give(places[num_good:])
            if num_good == 0 and not session.is_lost:
                session.ask(Connection.release, 0.0, np.array([lease], np.uint64))
        is_damaged = num_good < len(places)
        if num_good == 0:
            return self.nothing(), is_damaged
        places = places[:num_good]
        landing.hold(lease | session.tag, places, ttl)
        granted = Granted(
            lease | session.tag,
            landing.offsets(places),
            landing.header_offsets(places),
            landing.sequences(places),
            checksums[:num_good],
            landing.memory,
            landing.address,
        )
        return granted, is_damaged

    def release(self, lease: int) -> None:
        """Give a lease's room back; the daemon's lease is the caller's to end."""
        places = self._landing.end(lease)
        if places is not None:
            self._landing.give(places)

    def reserve(self, session: Session, hashes: BlockHashes, wait: float) -> Reserved:
        """Reserve slots in the daemon, and room here to fill first."""
        landing = self._landing
        count = len(hashes)
        places = landing.take(count, time.monotonic() + session.timeout)
        num_kept = 0
        statuses = np.full(count, NO_SPACE, np.uint8)
        offsets = np.zeros(count, np.uint64)
        reservation = 0
        try:
            fitting = hashes[: len(places)]
            if len(fitting):
                reservation, _, answered = session.reserve(fitting, wait)
                statuses[: len(fitting)] = answered
                wanted = np.flatnonzero(statuses == RESERVED)
                num_kept = len(wanted)
                offsets[wanted] = landing.offsets(places[:num_kept])
        finally:
            landing.give(places[num_kept:])
        if reservation:
            reservation |= session.tag
            landing.hold(-reservation, places[:num_kept], None)
        return Reserved(reservation, statuses, offsets, landing.memory, landing.address)

    def write(
        self, session: Session, reservation: int, ack: int, checksums: Offsets, hashes: BlockHashes
    ) -> int:
        """Send the blocks of a reservation and commit them; return the level that was reached.

        Raises:
            PeerUnavailableError: a block was damaged on its way, or the reservation is not known.
        """
        landing = self._landing
        places = landing.end(-reservation)
        if places is None:
            raise PeerUnavailableError("the reservation is gone")
        try:
            addresses = landing.offsets(places) + np.uint64(landing.address)
            level, whole = session.ask(
                Connection.write,
                0.0 if ack == 0 else ACK_SECONDS,
                reservation - session.tag,
                ack,
                checksums,
                hashes.array,
                hashes.start,
                hashes.parent,
                addresses,
                self._block_bytes,
            )
        finally:
            landing.give(places)
        if not np.all(whole):
            raise PeerUnavailableError("a block was damaged on its way to the daemon")
        return int(level)

    def forget(self, reservation: int) -> None:
        """Give a reservation's room back."""
        places = self._landing.end(-reservation)
        if places is not None:
            self._landing.give(places)

    def _num_whole(self, addresses: Offsets, checksums: Offsets, threads: int) -> int:
        """Return how many leading blocks have the checksum that was granted."""
        sums: npt.NDArray[np.uint64] = np.empty(len(addresses), np.uint64)
        _native.checksum_blocks(addresses, self._block_bytes, sums, threads)
        damaged = np.flatnonzero(sums != checksums[: len(sums)])
        return int(damaged[0]) if len(damaged) else len(sums)
