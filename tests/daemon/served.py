"""A daemon as HTTP sees it: a status with all of its parts, made up, and settable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvstore.daemon.exposition import Latency

MIB, GIB = 1 << 20, 1 << 30
BOUNDS = [1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 1e-2, 0.1, 1.0]
# Text that would be markup if it were ever taken for it.
HOSTILE = "<img src=x onerror=document.body.dataset.broken=1>"


def history(now: float) -> list[list[float]]:
    rows = []
    for i in range(300):
        wave = math.sin(i / 17) + 0.3 * math.sin(i / 3.1)
        ratio = 0.62 + 0.2 * math.sin(i / 41) + 0.04 * wave
        load, store = (2.1 + 0.9 * wave) * GIB, (0.5 + 0.2 * math.cos(i / 9)) * GIB
        rows.append([now - (299 - i) * 2.0, ratio, max(0.0, load), store, 9.1 * GIB, 61 * GIB])
    return rows


METRIC_VALUES: dict[str, float] = {
    "kvstore_queried_blocks_total": 1_234_567,
    "kvstore_hit_cpu_blocks_total": 701_000,
    "kvstore_hit_ssd_blocks_total": 102_345,
    "kvstore_missed_blocks_total": 431_222,
    "kvstore_missed_absent_blocks_total": 400_000,
    "kvstore_missed_evicted_blocks_total": 31_000,
    "kvstore_missed_deadline_blocks_total": 200,
    "kvstore_queried_tokens_total": 1_234_567 * 16,
    "kvstore_hit_cpu_tokens_total": 701_000 * 16,
    "kvstore_hit_ssd_tokens_total": 102_345 * 16,
    "kvstore_loaded_bytes_total": 803_345 * MIB,
    "kvstore_loaded_ssd_bytes_total": 102_345 * MIB,
    "kvstore_stored_bytes_total": 222_111 * MIB,
    "kvstore_ssd_written_bytes_total": 111_222 * MIB,
    "kvstore_ssd_read_bytes_total": 102_345 * MIB,
    "kvstore_evicted_cpu_blocks_total": 212_795,
    "kvstore_refused_no_space_blocks_total": 12,
    "kvstore_refused_orphan_blocks_total": 3,
    "kvstore_integrity_failures_total": 3,
    "kvstore_integrity_failures_ssd_total": 2,
    "kvstore_deadline_exceeded_total": 7,
    "kvstore_leases_expired_total": 1,
    "kvstore_cpu_used_bytes": 9.1 * GIB,
    "kvstore_cpu_capacity_bytes": 16 * GIB,
    "kvstore_cpu_blocks": 9318,
    "kvstore_ssd_used_bytes": 61 * GIB,
    "kvstore_ssd_capacity_bytes": 64 * GIB,
    "kvstore_ssd_blocks": 61_001,
    "kvstore_index_bytes": 9 * MIB,
    "kvstore_write_behind_bytes": 48 * MIB,
    "kvstore_requests_total": 98_765,
    "kvstore_connections": 9,
    "kvstore_scrub_checked_bytes_total": 33 * GIB,
    "kvstore_scrub_rounds_total": 3,
    "kvstore_scrub_progress_ratio": 0.25,
    "kvstore_adopted_blocks": 9001,
}


def make_status(now: float = 1_790_000_000.0) -> dict[str, Any]:
    client = {"uid": 1000, "address": "unix", "connections": 3, "connected_seconds": 5025.0}
    return {
        "version": "0.2.0",
        "epoch": "5f0c",
        "pid": 4242,
        "uptime_seconds": 93_784.0,
        "state": "serving",
        "addresses": ["unix:/run/kvstore/kvstore.sock", "tcp:127.0.0.1:9471"],
        "adopted": {"adopted": 9001, "discarded": 2, "quarantined": 4, "seconds": 0.21},
        "tiers": [
            {
                "tier": "cpu",
                "used_bytes": 9.1 * GIB,
                "capacity_bytes": 16 * GIB,
                "blocks": 9318,
            },
            {
                "tier": "ssd",
                "used_bytes": 61 * GIB,
                "capacity_bytes": 64 * GIB,
                "blocks": 61_001,
            },
        ],
        "metrics": dict(METRIC_VALUES),
        "rates": {
            "hit_ratio": 0.651,
            "load_bytes_per_second": 2.25 * GIB,
            "store_bytes_per_second": 512 * MIB,
            "requests_per_second": 431.2,
        },
        "history": history(now),
        "hot_prefixes": [
            {
                "namespace": 1,
                "first_block": f"{i:02x}d41f0c" * 8,
                "uses": 9000 // (i + 1),
                "blocks": 512 >> i % 5,
            }
            for i in range(12)
        ],
        "tenants": [
            {
                "name": "",
                "blocks": 9000,
                "cpu_used_bytes": 8 * GIB,
                "cpu_quota_bytes": 0,
                "ssd_used_bytes": 60 * GIB,
                "ssd_quota_bytes": 0,
            },
            {
                "name": 'a"b\\c',
                "blocks": 318,
                "cpu_used_bytes": 1.1 * GIB,
                "cpu_quota_bytes": 4 * GIB,
                "ssd_used_bytes": 1 * GIB,
                "ssd_quota_bytes": 8 * GIB,
            },
        ],
        "namespaces": [
            {
                "number": 1,
                "tenant": "",
                "model": "Qwen/Qwen3-8B",
                "block_bytes": 2.25 * MIB,
                "digest": "ab" * 32,
            }
        ],
        "clients": [
            {
                **client,
                "label": "engine-0",
                "pid": 5001,
                "requests": 81_234,
                "bytes_in": 31 * MIB,
                "bytes_out": 12 * MIB,
            },
            {
                **client,
                "label": HOSTILE,
                "pid": 5002,
                "requests": 17_531,
                "bytes_in": 7 * MIB,
                "bytes_out": 3 * MIB,
            },
        ],
        "leases": 12,
        "reservations": 2,
        "quarantined_slots": 4,
        "recent_errors": [
            {
                "time": now - 60,
                "level": "warning",
                "message": "write-behind: over its budget, 31 blocks stay in DRAM",
            },
            {"time": now - 4, "level": "error", "message": f"client {HOSTILE}: connection reset"},
        ],
    }


class FakeService:
    """Implements `kvstore.daemon.exposition.Served`."""

    def __init__(self) -> None:
        self.state = "serving"
        self.values = make_status()

    @property
    def latency_bounds(self) -> Sequence[float]:
        return BOUNDS

    def status(self) -> dict[str, Any]:
        return {**self.values, "state": self.state}

    def latencies(self) -> Mapping[str, Latency]:
        return {
            "acquire": ([0, 40, 50, 8, 1, 0, 0, 0, 0, 0, 1], 1.9),
            "lookup": ([100, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0.0006),
            "put": ([0] * 11, 0.0),
        }
