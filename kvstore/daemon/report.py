"""What the daemon says of itself: `status`, rates over the last seconds, and a bounded history."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

SAMPLE_SECONDS = 2.0
SAMPLES_MAX = 300
RATE_SECONDS = 10.0


class _Sample(NamedTuple):
    at: float  # monotonic
    queried: float
    hit: float
    loaded_bytes: float
    stored_bytes: float
    requests: float


def _sample(values: Mapping[str, float], at: float) -> _Sample:
    def of(key: str) -> float:
        return values.get(f"kvstore_{key}", 0)

    return _Sample(
        at,
        of("queried_blocks_total"),
        of("hit_cpu_blocks_total") + of("hit_ssd_blocks_total"),
        of("loaded_bytes_total"),
        of("stored_bytes_total"),
        of("requests_total"),
    )


class History:
    """Samples of the metrics, SAMPLE_SECONDS apart. Thread-safe."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self._lock = threading.Lock()
        self._first = _sample(values, time.monotonic())
        self._recent: deque[_Sample] = deque(
            [self._first], maxlen=int(RATE_SECONDS / SAMPLE_SECONDS) + 1
        )
        self._rows: deque[list[float]] = deque(maxlen=SAMPLES_MAX)

    def is_due(self) -> bool:
        return time.monotonic() - self._recent[-1].at >= SAMPLE_SECONDS

    def add(self, values: Mapping[str, float]) -> None:
        now = _sample(values, time.monotonic())
        with self._lock:
            rates = _rates(self._recent[-1], now)
            self._recent.append(now)
            self._rows.append(
                [
                    time.time(),
                    rates["hit_ratio"],
                    rates["load_bytes_per_second"],
                    rates["store_bytes_per_second"],
                    values.get("kvstore_cpu_used_bytes", 0),
                    values.get("kvstore_ssd_used_bytes", 0),
                ]
            )

    def rates(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return rates over the last RATE_SECONDS, up to now."""
        now = _sample(values, time.monotonic())
        with self._lock:
            return _rates(self._recent[0], now)

    def rows(self) -> list[list[float]]:
        with self._lock:
            return list(self._rows)


def _rates(before: _Sample, now: _Sample) -> dict[str, float]:
    seconds = max(now.at - before.at, 1e-3)
    queried = now.queried - before.queried
    return {
        "hit_ratio": (now.hit - before.hit) / queried if queried else 0.0,
        "load_bytes_per_second": (now.loaded_bytes - before.loaded_bytes) / seconds,
        "store_bytes_per_second": (now.stored_bytes - before.stored_bytes) / seconds,
        "requests_per_second": (now.requests - before.requests) / seconds,
    }


def tiers_of(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for tier in ("cpu", "ssd"):
        capacity = values.get(f"kvstore_{tier}_capacity_bytes")
        if capacity:
            rows.append(
                {
                    "tier": tier,
                    "used_bytes": values.get(f"kvstore_{tier}_used_bytes", 0),
                    "capacity_bytes": capacity,
                    "blocks": values.get(f"kvstore_{tier}_blocks", 0),
                }
            )
    return rows
