"""Every metric, declared once: name, kind, unit and what it counts.

Names follow Prometheus: `kvstore_` prefix, unit suffix, `_total` for counters. Invariant:
queried = hit(cpu) + hit(ssd) + missed, in blocks, for acquires and loads.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    name: str
    kind: Literal["counter", "gauge"]
    help: str


METRICS: tuple[Metric, ...] = (
    Metric("kvstore_queried_blocks_total", "counter", "blocks asked for by load and acquire"),
    Metric("kvstore_hit_cpu_blocks_total", "counter", "of those, found ready in the cpu tier"),
    Metric("kvstore_hit_ssd_blocks_total", "counter", "of those, read in from the ssd tier"),
    Metric("kvstore_missed_blocks_total", "counter", "of those, not had from any tier in time"),
    Metric(
        "kvstore_loaded_bytes_total", "counter", "bytes of the blocks granted to load and acquire"
    ),
    Metric("kvstore_stored_bytes_total", "counter", "bytes copied from engines by put"),
    Metric("kvstore_evicted_cpu_blocks_total", "counter", "blocks that left the cpu tier"),
    Metric("kvstore_refused_no_space_blocks_total", "counter", "puts refused: all slots held"),
    Metric("kvstore_refused_orphan_blocks_total", "counter", "puts refused: no block before them"),
    Metric("kvstore_integrity_failures_total", "counter", "blocks whose checksum did not match"),
    Metric("kvstore_ssd_written_bytes_total", "counter", "bytes written to the ssd tier"),
    Metric("kvstore_ssd_read_bytes_total", "counter", "bytes read from the ssd tier"),
    Metric("kvstore_ssd_write_failures_total", "counter", "blocks that the ssd did not take"),
    Metric("kvstore_ssd_read_failures_total", "counter", "blocks that the ssd did not give back"),
    Metric("kvstore_ssd_reclaimed_segments_total", "counter", "segments freed"),
    Metric(
        "kvstore_ssd_admission_skipped_blocks_total",
        "counter",
        "blocks not written to ssd when they were due: over the write budget",
    ),
    Metric(
        "kvstore_ssd_quota_refused_blocks_total",
        "counter",
        "blocks not written to ssd: over their tenant's quota",
    ),
    Metric(
        "kvstore_write_behind_deferred_blocks_total",
        "counter",
        "blocks offered to the ssd again later: queue full",
    ),
    Metric(
        "kvstore_write_behind_dropped_blocks_total",
        "counter",
        "blocks that stay in DRAM only: queue full, and too much to offer again",
    ),
    Metric(
        "kvstore_prefetch_dropped_blocks_total",
        "counter",
        "blocks of prefetches not begun: too many wait, or the disk does not answer",
    ),
    Metric("kvstore_background_errors_total", "counter", "failures of a background thread's step"),
    Metric("kvstore_deadline_exceeded_total", "counter", "calls that gave up at their deadline"),
    Metric("kvstore_leases_expired_total", "counter", "leases that ended by time"),
    Metric("kvstore_cpu_used_bytes", "gauge", "slots in use"),
    Metric("kvstore_cpu_capacity_bytes", "gauge", "size of the arena"),
    Metric("kvstore_cpu_blocks", "gauge", "blocks ready in the cpu tier"),
    Metric("kvstore_ssd_blocks", "gauge", "blocks on ssd"),
    Metric("kvstore_ssd_used_bytes", "gauge", "size of all segments"),
    Metric("kvstore_ssd_capacity_bytes", "gauge", "bound of the ssd tier"),
    Metric("kvstore_index_bytes", "gauge", "memory of the index"),
    Metric("kvstore_leases", "gauge", "leases held"),
    Metric("kvstore_codec_ratio", "gauge", "raw bytes per stored byte, encoded blocks"),
    Metric("kvstore_codec_error_rms_relative", "gauge", "sampled error of a lossy codec"),
    Metric("kvstore_codec_error_abs_max", "gauge", "largest sampled error of a lossy codec"),
    Metric("kvstore_write_behind_bytes", "gauge", "bytes waiting for the ssd"),
    Metric("kvstore_write_behind_backlog_blocks", "gauge", "blocks to be offered to it later"),
)


_PREFIX, _SUFFIX = "kvstore_", "_total"


class Counters:
    """Counters by name, without `kvstore_` and `_total`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = {
            metric.name.removeprefix(_PREFIX).removesuffix(_SUFFIX): 0
            for metric in METRICS
            if metric.kind == "counter"
        }

    def add(self, name: str, value: int = 1) -> None:
        """Add to `kvstore_<name>_total`. Raises KeyError for a name that is not declared."""
        with self._lock:
            self._values[name] += value

    def add_load(self, queried: int, hit_cpu: int, hit_ssd: int, num_bytes: int) -> None:
        """Count one load or acquire, in blocks; under one lock: the smallest takes 10 us."""
        with self._lock:
            values = self._values
            values["queried_blocks"] += queried
            values["hit_cpu_blocks"] += hit_cpu
            values["hit_ssd_blocks"] += hit_ssd
            values["missed_blocks"] += queried - hit_cpu - hit_ssd
            values["loaded_bytes"] += num_bytes

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return {f"{_PREFIX}{name}{_SUFFIX}": value for name, value in self._values.items()}


def metrics_page() -> str:
    """Return docs/METRICS.md."""
    rows = [f"| `{m.name}` | {m.kind} | {m.help} |" for m in METRICS]
    return "\n".join(
        [
            "# Metrics",
            "",
            "Generated from `kvstore/metrics.py`; `tests/test_tidy.py` keeps the two alike.",
            "`kvstore.Store.stats()` returns them by name.",
            "",
            "| name | kind | what |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
