"""Peers: what one process has for fetching from other daemons, and for serving them.

Its transport endpoint has the arena registered, for reading only. What a peer reads there is what
it holds leases on; but whoever knows the peers' secret could read all of the arena, every tenant's
blocks: daemons trust one another. The endpoint's own secret is made from the peers' and the
daemon's epoch, so it never travels.
"""

from __future__ import annotations

import hashlib
import hmac
import ssl
import threading
import time
from concurrent.futures import Future
from typing import Any

import msgspec

from kvstore.errors import StoreClosedError
from kvstore.peers.fetcher import Fetcher
from kvstore.peers.held import HeldBlocks
from kvstore.peers.holders import Holders, Means
from kvstore.tiers.fetching import Wanted
from kvstore.tiers.local import Tiers
from kvstore.transport import Endpoint, TransportSettings

_CLOSE_SECONDS = 5.0
_RDMA = "rc,ud,dc"  # UCX's transports that need an RDMA device


def endpoint_secret(peer_secret: bytes, epoch: bytes) -> bytes:
    """Return the secret of the endpoint of a daemon's epoch."""
    return hmac.new(peer_secret, b"kvstore endpoint\0" + epoch, hashlib.sha256).digest()


class Peers:
    """See `kvstore.tiers.fetching.Fetches`. Thread-safe.

    Raises:
        KVStoreError: see `kvstore.transport.Endpoint`.
    """

    def __init__(
        self,
        tiers: Tiers,
        secret: bytes,
        *,
        epoch: bytes,
        listen: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """
        Args:
            epoch: of this daemon; of an embedded store, anything that no other has.
            listen: host on which peers reach the movers.
            tls: for holders at "tls:host:port".
        """
        config = tiers.config
        is_auto = config.movers == "auto"
        movers = tuple(
            name
            for name in config.mover_names
            if not (config.peer_require_rdma and name not in ("shm", "ucx"))
        )
        settings = TransportSettings(
            listen=listen,
            movers=None if is_auto and not config.peer_require_rdma else movers,
            ucx_tls=_RDMA if config.peer_require_rdma else "",
        )
        self.endpoint = Endpoint(settings, secret=endpoint_secret(secret, epoch))
        core = tiers.core
        arena = (tiers.arena.ctypes.data, len(tiers.arena))
        self._region = self.endpoint.register(arena, fd=core.arena_fd)
        means = Means(
            self.endpoint,
            secret,
            lambda theirs: endpoint_secret(secret, theirs),
            # Named, ucx may be used without RDMA too.
            None if is_auto or config.peer_require_rdma else movers,
            not config.peer_require_rdma,
            config.threads,
            tls,
        )
        self.holders = Holders(means)
        self.fetcher = Fetcher(
            core,
            self._find,
            bandwidth=config.peer_bandwidth_bytes,
            stored=lambda number, hashes: tiers.stored(number, hashes.array),
        )
        tiers.outside.append(self._counted)

    def _find(self, address: str, wanted: Wanted) -> HeldBlocks:
        return HeldBlocks(self.holders.get(address), wanted.tenant, wanted.namespace)

    def offer(self) -> tuple[bytes, int]:
        """Return what a peer needs to read the arena, but for the secret, and its region."""
        info = msgspec.structs.replace(self.endpoint.info(), secret=b"")
        return info.encode(), self._region.region_id

    def fetch(self, wanted: Wanted, holders: list[str], timeout: float) -> Future[int]:
        return self.fetcher.fetch(wanted, holders, timeout)

    def describe(self) -> dict[str, Any]:
        """For people, see `kvstore.status.PeersStatus`."""
        return {
            "movers": list(self.endpoint.movers),
            "unavailable": self.endpoint.unavailable,
            "address": self.endpoint.tcp_address or "",
            "holders": [holder.describe() for holder in self.holders.list()],
        }

    def _counted(self) -> dict[str, int]:
        return {
            **self.fetcher.counts.snapshot(),
            "kvstore_peer_quarantined_bytes": self.fetcher.quarantine.num_bytes,
            "kvstore_peer_sessions": sum(one.num_sessions for one in self.holders.list()),
        }

    def close(self, timeout: float = _CLOSE_SECONDS) -> None:
        deadline = time.monotonic() + min(timeout, _CLOSE_SECONDS)
        self.fetcher.close(max(0.0, deadline - time.monotonic()))
        self.holders.close(max(0.5, deadline - time.monotonic()))
        self.endpoint.close()


class LatePeers:
    """Peers that are made when first somebody fetches: most stores never do. Thread-safe."""

    def __init__(self, tiers: Tiers, secret: bytes, *, epoch: bytes) -> None:
        self._tiers = tiers
        self._secret = secret
        self._epoch = epoch
        self._lock = threading.Lock()
        self._peers: Peers | None = None
        self._closed = False

    def fetch(self, wanted: Wanted, holders: list[str], timeout: float) -> Future[int]:
        with self._lock:
            if self._closed:
                raise StoreClosedError("the store is closed")
            if self._peers is None:
                self._peers = Peers(self._tiers, self._secret, epoch=self._epoch)
            peers = self._peers
        return peers.fetch(wanted, holders, timeout)

    def close(self, timeout: float) -> None:
        with self._lock:
            self._closed = True
            peers = self._peers
        if peers is not None:
            peers.close(timeout)
