"""HeldBlocks: a holder as one flight sees it; see `kvstore.peers.sources.Source`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from kvstore import _native
from kvstore.block import BlockHashes, Namespace
from kvstore.errors import (
    ConfigError,
    DeadlineExceededError,
    KVStoreError,
    PeerUnavailableError,
)
from kvstore.peers.counts import FRAMES
from kvstore.peers.holders import Holder
from kvstore.peers.session import PeerSession
from kvstore.peers.sources import Held, Read, U64s
from kvstore.transport import Batch, Link, Status
from kvstore.transport.types import all_of

log = logging.getLogger(__name__)

_GIVEN_UP = (Status.LOST, Status.LATE, Status.CANCELLED)

_Answer = TypeVar("_Answer")


class _Unsettled:
    """A link that was given up."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def settle(self, timeout: float) -> bool:
        return self._link.close(timeout)


class HeldBlocks:
    """See `kvstore.peers.sources.Source`."""

    def __init__(self, holder: Holder, tenant: str, namespace: Namespace) -> None:
        self._holder = holder
        self._tenant = tenant
        self._namespace = namespace
        self._block_bytes = namespace.spec.block_bytes

    @property
    def address(self) -> str:
        return self._holder.address

    @property
    def bytes_per_second(self) -> float:
        return self._holder.bytes_per_second

    def submit(self, step: Callable[[], None]) -> bool:
        return self._holder.threads.submit(step)

    def available(self, hashes: BlockHashes, seconds: float) -> int:
        try:
            session = self._holder.session(self._tenant, self._namespace)
        except ConfigError:
            return 0  # nothing of this namespace is there
        return self._ask(lambda: session.match(hashes, seconds))

    def acquire(self, hashes: BlockHashes, seconds: float) -> Held:
        session = self._holder.session(self._tenant, self._namespace)
        return self._ask(lambda: session.acquire(hashes, seconds))

    def _ask(self, call: Callable[[], _Answer]) -> _Answer:
        try:
            return call()
        except (PeerUnavailableError, DeadlineExceededError):
            self._holder.failed()
            raise
        except (ValueError, LookupError, TypeError) as error:
            raise PeerUnavailableError(f"{self.address}: {error}") from error

    def read(self, held: Held, places: U64s, addresses: U64s, seconds: float) -> Read:
        assert isinstance(held.session, PeerSession)
        began = time.monotonic()
        try:
            link = self._holder.link(held.session.welcome, seconds)
        except KVStoreError as error:
            log.warning("%s: no link: %s", self.address, error)
            link = None
        left = max(0.0, seconds - (time.monotonic() - began))
        began = time.monotonic()
        if link is not None:
            read = self._read_by(link, held, places, addresses, left)
        elif self._holder.means.allow_frames:
            read = self._read_frames(held.session, held, places, addresses, left)
        else:
            return Read(all_of(Status.REFUSED, len(places)), FRAMES)
        num_whole = int(np.count_nonzero(read.statuses == Status.OK))
        if num_whole == len(places):
            self._holder.measured(num_whole * self._block_bytes, time.monotonic() - began)
        return read

    def _read_by(
        self, link: Link, held: Held, places: U64s, addresses: U64s, seconds: float
    ) -> Read:
        assert isinstance(held.session, PeerSession)
        batch = Batch(addresses, held.offsets[places], self._block_bytes, held.checksums[places])
        statuses = link.read(held.session.welcome.region, batch, timeout=seconds)
        given_up = bool(np.isin(statuses, _GIVEN_UP).any())
        if given_up:
            self._holder.failed()
        if given_up and link.settles_late:
            self._holder.drop_link(link)
            return Read(statuses, link.mover, _Unsettled(link))
        return Read(statuses, link.mover)

    def _read_frames(
        self, session: PeerSession, held: Held, places: U64s, addresses: U64s, seconds: float
    ) -> Read:
        """Over the control connection: one request for each run of places."""
        statuses = all_of(Status.LOST, len(places))
        deadline = time.monotonic() + seconds
        cuts = np.flatnonzero(np.diff(places.astype(np.int64)) != 1) + 1
        try:
            for run in np.split(np.arange(len(places)), cuts):
                left = max(0.001, deadline - time.monotonic())
                session.read(held, int(places[run[0]]), addresses[run], self._block_bytes, left)
                sums = np.empty(len(run), np.uint64)
                _native.checksum_blocks(
                    addresses[run], self._block_bytes, sums, self._holder.means.threads
                )
                is_whole = sums == held.checksums[places[run]]
                statuses[run] = np.where(is_whole, Status.OK, Status.DAMAGED)
        except DeadlineExceededError:
            self._holder.failed()
            statuses[statuses == Status.LOST] = Status.LATE
        except PeerUnavailableError:
            self._holder.failed()
        except (KVStoreError, ValueError, LookupError, TypeError) as error:
            log.warning("%s: read: %s", self.address, error)
            statuses[statuses == Status.LOST] = Status.REFUSED
        return Read(statuses, FRAMES)

    def release(self, held: Held) -> None:
        if not held.lease or not isinstance(held.session, PeerSession):
            return
        try:
            held.session.release(held)
        except (KVStoreError, ValueError, LookupError, TypeError) as error:
            log.debug("%s: a lease was not released: %s", self.address, error)

    def report_damaged(self, block_hash: bytes) -> None:
        try:
            session = self._holder.session(self._tenant, self._namespace)
            session.report_damaged(block_hash)
        except (KVStoreError, ValueError, LookupError, TypeError) as error:
            log.warning("%s: it was not told of a damaged block: %s", self.address, error)
