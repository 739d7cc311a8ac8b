"""What fetches count, under the names of kvstore/metrics.py."""

from __future__ import annotations

from kvstore.metrics import PEER_METRICS, Counters

FRAMES = "frames"  # payload frames of the control connection: where no mover serves both ends


class PeerCounts:
    """Thread-safe."""

    def __init__(self) -> None:
        self._counters = Counters(PEER_METRICS)

    def fetched(self, mover: str, blocks: int, num_bytes: int) -> None:
        if blocks:
            self._counters.add(f"peer_fetched_{mover}_blocks", blocks)
            self._counters.add(f"peer_fetched_{mover}_bytes", num_bytes)

    def failed(self, reason: str, count: int = 1) -> None:
        self._counters.add(f"peer_failures_{reason}", count)

    def fetch(self, *, is_joined: bool) -> None:
        self._counters.add("peer_fetches_joined" if is_joined else "peer_fetches")

    def snapshot(self) -> dict[str, int]:
        return self._counters.snapshot()
