"""PeerSession: a client of another daemon that proved the peers' secret; one tenant's namespace."""

from __future__ import annotations

import itertools

import numpy as np

from kvstore import wire
from kvstore._native import Connection
from kvstore.block import BlockHashes
from kvstore.client.handshake import Target
from kvstore.client.session import Session
from kvstore.errors import KVStoreError
from kvstore.peers.sources import Held, U64s

CALL_SECONDS = 1.0  # that a holder has to answer, on top of what it may wait for itself
SSD_SECONDS_MAX = 2.0  # that a holder may read from its ssd for one piece
LEASE_SECONDS = 30.0  # at most; whoever dies with leases holds slots there for so long

_generations = itertools.count(1)


class PeerSession:
    """See above. Thread-safe, as `Session` is.

    Raises:
        ConfigError: the holder has nothing of this namespace.
        KVStoreError: see `kvstore.client.handshake.dial`.
    """

    def __init__(self, target: Target) -> None:
        self._session = Session(target, CALL_SECONDS, next(_generations), None, self._lost)

    def _lost(self, session: Session, _error: KVStoreError) -> None:
        session.close()  # nobody writes into its slots: we only read there

    @property
    def welcome(self) -> wire.Welcome:
        return self._session.welcome

    @property
    def is_lost(self) -> bool:
        return self._session.is_lost

    def match(self, hashes: BlockHashes, seconds: float) -> int:
        wait = min(0.0, seconds - CALL_SECONDS)
        return self._session.ask(Connection.match, wait, hashes.array, hashes.start, hashes.parent)

    def acquire(self, hashes: BlockHashes, seconds: float) -> Held:
        wait = max(0.0, min(SSD_SECONDS_MAX, seconds / 2))
        lease, offsets, _, _, checksums = self._session.ask(
            Connection.acquire,
            min(wait, seconds - CALL_SECONDS),
            min(seconds + CALL_SECONDS, LEASE_SECONDS),
            wait,
            0,
            hashes.array,
            hashes.start,
            hashes.parent,
        )
        return Held(lease, offsets, checksums, self)

    def read(self, held: Held, first: int, addresses: U64s, size: int, seconds: float) -> None:
        self._session.ask(
            Connection.read, seconds - CALL_SECONDS, held.lease, first, addresses, size
        )

    def release(self, held: Held) -> None:
        if not self.is_lost:
            self._session.ask(Connection.release, 0.0, np.array([held.lease], np.uint64))

    def report_damaged(self, block_hash: bytes) -> None:
        body = wire.encode(wire.Corrupt(block_hash))
        self._session.ask(Connection.call, 0.0, wire.Op.CALL, body)

    def close(self) -> None:
        self._session.close()
