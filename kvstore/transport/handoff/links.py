"""The links that one process' hand-offs share: one to each peer's endpoint while it is alive."""

from __future__ import annotations

import threading

from kvstore.transport.endpoint import Endpoint, Link
from kvstore.transport.types import EndpointInfo

LINKS_MAX = 256  # to peers that are alive; more are not handed off to from one process


class Links:
    """Thread-safe, but two threads that ask for the same new peer connect one after the other.

    Args:
        endpoint: ours; not closed by this.
        movers: only these, in this order; None: the best that works.
        timeout: seconds that connecting may take with each mover.
    """

    def __init__(
        self, endpoint: Endpoint, movers: tuple[str, ...] | None = None, timeout: float = 2.0
    ) -> None:
        self._endpoint = endpoint
        self._movers = movers
        self._timeout = timeout
        self._links: dict[int, Link] = {}
        self._lock = threading.Lock()

    def connect(self, encoded: bytes) -> Link:
        """Return a link that is alive to the endpoint that these bytes describe.

        Raises:
            KVStoreError: there is none, and none can be made now.
        """
        info = EndpointInfo.decode(encoded)
        with self._lock:
            link = self._links.get(info.epoch)
            if link is None or not link.is_alive:
                for epoch in [epoch for epoch, old in self._links.items() if not old.is_alive]:
                    self._links.pop(epoch).close(0.0)
                while len(self._links) >= LINKS_MAX:
                    self._links.pop(next(iter(self._links))).close(0.0)
                link = self._endpoint.connect(info, movers=self._movers, timeout=self._timeout)
                self._links[info.epoch] = link
            return link

    def close(self) -> None:
        with self._lock:
            while self._links:
                self._links.popitem()[1].close(self._timeout)
