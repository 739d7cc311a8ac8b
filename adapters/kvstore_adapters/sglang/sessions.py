"""Session: the way from a prefill server to the memory of one decode server.

SGLang knows that server by its session id, which is the address of its endpoint's TCP listener, and
its memory by addresses in that process. Which regions these are is asked once, and again when an
address is in none: SGLang registers more memory later.
"""

from __future__ import annotations

import logging
import threading
import time

import numpy as np
import numpy.typing as npt

from kvstore import DeadlineExceededError, IncompatibleError, PeerUnavailableError
from kvstore.transport import Batch, Endpoint, Link, RegionInfo, Status, checksums_of
from kvstore_adapters.sglang.address_map import Addresses, AddressMap

Statuses = npt.NDArray[np.uint8]

log = logging.getLogger(__name__)

# What another attempt, over a new link, can put right: a link that broke while nobody used it, a
# region that has become another. A peer that is late is not asked for more.
_WORTH_ANOTHER = (Status.DAMAGED, Status.REFUSED, Status.LOST)
_CONNECT_SECONDS = 5.0
_CLOSE_SECONDS = 1.0


class Session:
    """Thread safety: all methods may be called from any thread.

    Args:
        endpoint: ours.
        session_id: "host:port" of the other's TCP listener.
        secret: which both know.
        movers: that may be used, in this order; None: the best.
    """

    def __init__(
        self, endpoint: Endpoint, session_id: str, secret: bytes, movers: tuple[str, ...] | None
    ) -> None:
        self.session_id = session_id
        self._endpoint = endpoint
        self._secret = secret
        self._movers = movers
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._regions: list[RegionInfo] = []
        self._map = AddressMap(())
        self._closed = False

    def write(
        self, addresses: Addresses, peer_addresses: Addresses, lengths: Addresses, deadline: float
    ) -> Statuses:
        """Write pieces of our memory to the peer's, twice where that can help.

        Args:
            deadline: by `time.monotonic`.

        Returns:
            The status of each piece.

        Raises:
            PeerUnavailableError, DeadlineExceededError: the peer is not there.
            IncompatibleError: it is, and does not take us.
        """
        checksums = checksums_of(addresses, lengths)
        statuses = np.full(len(addresses), Status.LOST, np.uint8)
        for _ in range(2):
            todo = np.flatnonzero(statuses != Status.OK)
            link, regions = self._connected(peer_addresses[todo], lengths[todo], deadline)
            statuses[todo] = _write(
                link,
                regions,
                Batch(addresses[todo], peer_addresses[todo], lengths[todo], checksums[todo]),
                deadline,
            )
            bad = statuses[statuses != Status.OK]
            if not len(bad):
                break
            # What the peer may still be taking in of the first attempt must not come after the
            # second, when SGLang may have given the page to another request.
            is_settled = self._drop(link)
            if not is_settled or not np.isin(bad, _WORTH_ANOTHER).all():
                break
            log.info("hand-off to %s: %s; once more", self.session_id, summary(bad))
        return statuses

    def probe(self, timeout: float) -> None:
        """See whether the peer is there and takes us.

        Raises: as `write`.
        """
        with self._lock:
            if self._link is not None and self._link.is_alive:
                return
            self._connect(time.monotonic() + timeout)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            link, self._link = self._link, None
        if link is not None:
            link.close(_CLOSE_SECONDS)

    def _connected(
        self, peer_addresses: Addresses, lengths: Addresses, deadline: float
    ) -> tuple[Link, AddressMap]:
        """A link that is alive, and a map that has these addresses, if the peer has them at all."""
        with self._lock:
            link = self._link
            if link is None or not link.is_alive:
                link = self._connect(deadline)
            elif (self._map.find(peer_addresses, lengths) < 0).any():
                link = self._refreshed(link, deadline)
            return link, self._map

    def _refreshed(self, link: Link, deadline: float) -> Link:
        """Learn what the peer registered since. Others use the link meanwhile, so it is kept."""
        info = self._endpoint.info_of(self.session_id, self._secret, _left(deadline))
        if info.epoch != link.peer.epoch:
            return self._connect(deadline)
        known = {region.region_id for region in self._regions}
        for region in info.regions:
            if region.region_id not in known:
                link.add_region(region)
        self._regions = info.regions
        self._map = AddressMap(info.regions)
        return link

    def _connect(self, deadline: float) -> Link:
        if self._closed:
            raise PeerUnavailableError(f"{self.session_id}: given up")
        link = self._endpoint.connect_to(
            self.session_id, self._secret, movers=self._movers, timeout=_left(deadline)
        )
        self._regions = link.peer.regions
        self._map = AddressMap(self._regions)
        self._link = link
        log.info(
            "hand-off to %s by %s (%s), %d regions",
            self.session_id,
            link.mover,
            link.reason,
            len(self._map),
        )
        return link

    def _drop(self, link: Link) -> bool:
        """Whether nothing of its moves is under way any more, here or there."""
        with self._lock:
            if self._link is link:
                self._link = None
        return link.close(_CLOSE_SECONDS)


def _left(deadline: float) -> float:
    """Seconds that asking the peer may take.

    Raises:
        DeadlineExceededError: none are left.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceededError("no time left to ask the peer")
    return min(left, _CONNECT_SECONDS)


def _write(link: Link, regions: AddressMap, batch: Batch, deadline: float) -> Statuses:
    """Write to all regions at once. The batch's remote offsets are addresses."""
    found = regions.find(batch.remote_offsets, batch.lengths)
    statuses = np.full(len(batch), Status.REFUSED, np.uint8)
    known = np.flatnonzero(found >= 0)
    moves = []
    for part in regions.split(found[known], batch.remote_offsets[known]):
        rows = known[part.rows]
        pieces = batch.pick(rows)
        pieces.remote_offsets = part.offsets
        left = max(deadline - time.monotonic(), 0.001)
        moves.append((rows, link.submit_write(part.region_id, pieces, timeout=left)))
    for rows, move in moves:
        statuses[rows] = move.wait()  # it ends by the deadline itself
    return statuses


def summary(statuses: Statuses) -> str:
    """What became of pieces that were not OK, such as "3 pieces lost"."""
    kinds, counts = np.unique(statuses, return_counts=True)
    return ", ".join(
        f"{count} pieces {Status(kind).name.lower()}"
        for kind, count in zip(kinds, counts, strict=True)
    )


ERRORS = (PeerUnavailableError, DeadlineExceededError, IncompatibleError)
