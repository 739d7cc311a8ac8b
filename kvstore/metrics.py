"""Every metric, declared once: name, kind, labels, unit and what it counts.

A value has two spellings. `Store.stats()`, the daemon's status and `kvstore status` give a flat
dict of *keys*, in which a label's value is part of the name (`kvstore_hit_cpu_blocks_total`).
`/metrics` gives Prometheus *names* with labels (`kvstore_hit_blocks_total{tier="cpu"}`). Each
metric lists which of its keys is which series; one without labels has its name as its key.

Names follow Prometheus: `kvstore_` prefix, base units as suffix, `_total` for counters. Invariants,
in blocks and for acquires and loads:
    queried = hit(cpu) + hit(ssd) + missed, and missed is the sum over its reasons.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
# Who counts it: tiers (embedded or a daemon's), the daemon around them, what fetches from other
# daemons, a daemon's client.
Part = Literal["store", "daemon", "peer", "client"]
Series = tuple[tuple[str, str], ...]

MISS_REASONS = (
    "absent",  # never here, or so long ago that it is forgotten
    "evicted",  # was here, and left all tiers
    "pending",  # still being written
    "ssd",  # on ssd, and the caller did not wait for it
    "deadline",  # on ssd, not read in within the caller's timeout
    "corrupt",  # failed its checksum, and was removed
    "no_space",  # on ssd, and no slot of the cpu tier could be freed for it
    "unavailable",  # the tier below does not answer
)
OTHER = "other"  # a reason that was not told apart


@dataclass(frozen=True)
class Metric:
    """One metric. `series` pairs the value of the only label with the key that holds it.

    Where `sum_key` is set, that key counts all of them, and what its series do not explain is
    exposed under the label value `rest`. A metric with labels and no series has its values from
    elsewhere than `stats()`: `source` says where.
    """

    name: str
    kind: Kind
    help: str
    part: Part = "store"
    labels: tuple[str, ...] = ()
    series: Series = ()
    sum_key: str = ""
    rest: str = ""
    source: str = ""

    def stats_keys(self) -> Iterator[str]:
        """Yield the names under which `stats()` has it."""
        if self.sum_key:
            yield self.sum_key
        for _, key in self.series:
            yield key
        if not self.labels and not self.source:
            yield self.name

    def samples(self, values: Mapping[str, float]) -> Iterator[tuple[tuple[str, ...], float]]:
        """Yield label values and value of each series that `values`, as of `stats()`, has."""
        explained = 0.0
        for label, key in self.series:
            if key in values:
                explained += values[key]
                yield (label,), values[key]
        if self.sum_key and self.sum_key in values:
            # Both are read without a common lock: never below zero.
            yield (self.rest,), max(0.0, values[self.sum_key] - explained)
        if not self.labels and not self.source and self.name in values:
            yield (), values[self.name]


def _by_tier(name: str, kind: Kind, help: str, cpu: str = "", ssd: str = "") -> Metric:
    series = tuple((tier, key) for tier, key in (("cpu", cpu), ("ssd", ssd)) if key)
    return Metric(name, kind, help, labels=("tier",), series=series)


STORE_METRICS: tuple[Metric, ...] = (
    Metric("kvstore_queried_blocks_total", "counter", "blocks asked for by load and acquire"),
    _by_tier(
        "kvstore_hit_blocks_total",
        "counter",
        "of those, found ready in cpu or read in from ssd",
        cpu="kvstore_hit_cpu_blocks_total",
        ssd="kvstore_hit_ssd_blocks_total",
    ),
    Metric(
        "kvstore_missed_blocks_total",
        "counter",
        "of those, not had from any tier in time, and why",
        labels=("reason",),
        series=tuple((why, f"kvstore_missed_{why}_blocks_total") for why in MISS_REASONS),
        sum_key="kvstore_missed_blocks_total",
        rest=OTHER,
    ),
    Metric("kvstore_queried_tokens_total", "counter", "tokens of the blocks asked for"),
    _by_tier(
        "kvstore_hit_tokens_total",
        "counter",
        "tokens of the blocks found, by the tier they were in",
        cpu="kvstore_hit_cpu_tokens_total",
        ssd="kvstore_hit_ssd_tokens_total",
    ),
    Metric(
        "kvstore_loaded_bytes_total",
        "counter",
        "bytes of the blocks granted to load and acquire, by the tier they were in",
        labels=("tier",),
        series=(("ssd", "kvstore_loaded_ssd_bytes_total"),),
        sum_key="kvstore_loaded_bytes_total",
        rest="cpu",
    ),
    _by_tier(
        "kvstore_stored_bytes_total",
        "counter",
        "bytes put into the cpu tier by engines, and written to ssd",
        cpu="kvstore_stored_bytes_total",
        ssd="kvstore_ssd_written_bytes_total",
    ),
    _by_tier(
        "kvstore_evicted_blocks_total",
        "counter",
        "blocks that left a tier",
        cpu="kvstore_evicted_cpu_blocks_total",
    ),
    Metric(
        "kvstore_refused_blocks_total",
        "counter",
        "puts refused: all slots held, or the block before them is not there",
        labels=("reason",),
        series=(
            ("no_space", "kvstore_refused_no_space_blocks_total"),
            ("orphan", "kvstore_refused_orphan_blocks_total"),
        ),
    ),
    Metric(
        "kvstore_integrity_failures_total",
        "counter",
        "blocks whose checksum did not match",
        labels=("tier",),
        series=(("ssd", "kvstore_integrity_failures_ssd_total"),),
        sum_key="kvstore_integrity_failures_total",
        rest="cpu",
    ),
    _by_tier(
        "kvstore_tier_read_bytes_total",
        "counter",
        "bytes read from a tier's device",
        ssd="kvstore_ssd_read_bytes_total",
    ),
    _by_tier(
        "kvstore_tier_write_failures_total",
        "counter",
        "blocks that a tier did not take",
        ssd="kvstore_ssd_write_failures_total",
    ),
    _by_tier(
        "kvstore_tier_read_failures_total",
        "counter",
        "blocks that a tier did not give back",
        ssd="kvstore_ssd_read_failures_total",
    ),
    _by_tier(
        "kvstore_reclaimed_segments_total",
        "counter",
        "segments freed",
        ssd="kvstore_ssd_reclaimed_segments_total",
    ),
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
    _by_tier(
        "kvstore_tier_used_bytes",
        "gauge",
        "cpu: slots in use; ssd: size of all segments",
        cpu="kvstore_cpu_used_bytes",
        ssd="kvstore_ssd_used_bytes",
    ),
    _by_tier(
        "kvstore_tier_capacity_bytes",
        "gauge",
        "cpu: size of the arena; ssd: bound of the directory",
        cpu="kvstore_cpu_capacity_bytes",
        ssd="kvstore_ssd_capacity_bytes",
    ),
    _by_tier(
        "kvstore_tier_blocks",
        "gauge",
        "blocks ready in a tier; most on ssd are in cpu too",
        cpu="kvstore_cpu_blocks",
        ssd="kvstore_ssd_blocks",
    ),
    Metric("kvstore_index_bytes", "gauge", "memory of the index"),
    Metric("kvstore_leases", "gauge", "leases held"),
    Metric("kvstore_codec_ratio", "gauge", "raw bytes per stored byte, encoded blocks"),
    Metric("kvstore_codec_error_rms_relative", "gauge", "sampled error of a lossy codec"),
    Metric("kvstore_codec_error_abs_max", "gauge", "largest sampled error of a lossy codec"),
    Metric("kvstore_write_behind_bytes", "gauge", "bytes waiting for the ssd"),
    Metric("kvstore_write_behind_backlog_blocks", "gauge", "blocks to be offered to it later"),
)


def _daemon(name: str, kind: Kind, help: str) -> Metric:
    return Metric(name, kind, help, part="daemon")


def _listed(name: str, kind: Kind, help: str, labels: tuple[str, ...], source: str) -> Metric:
    return Metric(name, kind, help, part="daemon", labels=labels, source=source)


DAEMON_METRICS: tuple[Metric, ...] = (
    _daemon("kvstore_requests_total", "counter", "frames answered"),
    _listed(
        "kvstore_request_seconds",
        "histogram",
        "time from a request's last byte to its reply",
        ("op",),
        "latencies",
    ),
    _daemon("kvstore_protocol_errors_total", "counter", "connections ended for a malformed frame"),
    _daemon("kvstore_read_bytes_total", "counter", "payload sent through sockets by READ"),
    _daemon("kvstore_written_bytes_total", "counter", "payload received through sockets by WRITE"),
    _daemon("kvstore_refused_busy_total", "counter", "requests refused: too many waited already"),
    _daemon(
        "kvstore_notices_dropped_total", "counter", "puts and uses that the ssd did not hear of"
    ),
    _daemon("kvstore_accepted_connections_total", "counter", "connections taken"),
    _daemon("kvstore_connections_refused_total", "counter", "connections refused: too many open"),
    _daemon(
        "kvstore_timed_out_connections_total", "counter", "connections that stalled within a frame"
    ),
    _daemon("kvstore_connections", "gauge", "connections open"),
    _daemon("kvstore_tasks", "gauge", "requests that wait for Python"),
    _daemon("kvstore_parked_requests", "gauge", "requests that wait for room or for a block"),
    _daemon("kvstore_clients", "gauge", "clients connected"),
    _daemon("kvstore_reservations", "gauge", "reservations open"),
    _daemon("kvstore_quarantined_slots", "gauge", "slots that a writer of before may still touch"),
    _daemon("kvstore_adopted_blocks", "gauge", "blocks taken over from the daemon before"),
    _daemon("kvstore_discarded_slots", "gauge", "slots of the daemon before that were not whole"),
    _daemon("kvstore_adoption_seconds", "gauge", "time that taking over took"),
    _daemon("kvstore_scrub_checked_bytes_total", "counter", "bytes checked by the scrubber"),
    _daemon("kvstore_scrub_rounds_total", "counter", "times the scrubber went over the arena"),
    _daemon("kvstore_scrub_progress_ratio", "gauge", "part of this round that is done, 0 to 1"),
    _listed(
        "kvstore_tenant_used_bytes",
        "gauge",
        "bytes of a tenant's blocks",
        ("tenant", "tier"),
        "tenants",
    ),
    _listed(
        "kvstore_tenant_quota_bytes",
        "gauge",
        "a tenant's bound; absent where it has none",
        ("tenant", "tier"),
        "tenants",
    ),
    _listed("kvstore_tenant_blocks", "gauge", "blocks of a tenant", ("tenant",), "tenants"),
    _listed("kvstore_ready", "gauge", "1 while serving, 0 while adopting or draining", (), "state"),
    _listed("kvstore_build_info", "gauge", "1; the version is a label", ("version",), "version"),
)

# "frames": the payload frames of the control connection, where no mover serves both ends.
_MOVERS = ("shm", "ucx", "tcp", "frames")
FETCH_FAILURES = (
    "damaged",  # blocks that failed their checksum on arrival
    "refused",  # blocks that the holder's endpoint would not give
    "lost",  # blocks whose link broke on the way
    "late",  # blocks that did not come in time
    "unreachable",  # times that a holder did not answer, or refused us
    "absent",  # times that a holder had none of the blocks
    "no_space",  # times that no slot of the cpu tier could be freed for more
    "busy",  # fetches not begun: too many wait
)

PEER_METRICS: tuple[Metric, ...] = (
    Metric("kvstore_peer_fetches_total", "counter", "fetches asked for", part="peer"),
    Metric(
        "kvstore_peer_fetches_joined_total",
        "counter",
        "times that one waited for blocks that another had on their way",
        part="peer",
    ),
    Metric(
        "kvstore_peer_fetched_blocks_total",
        "counter",
        "blocks that came whole from other daemons, by what moved them",
        part="peer",
        labels=("mover",),
        series=tuple((name, f"kvstore_peer_fetched_{name}_blocks_total") for name in _MOVERS),
    ),
    Metric(
        "kvstore_peer_fetched_bytes_total",
        "counter",
        "their bytes",
        part="peer",
        labels=("mover",),
        series=tuple((name, f"kvstore_peer_fetched_{name}_bytes_total") for name in _MOVERS),
    ),
    Metric(
        "kvstore_peer_failures_total",
        "counter",
        "what failed at a holder, in blocks (damaged, refused, lost, late), else in times; it may "
        "have gone well at another holder",
        part="peer",
        labels=("reason",),
        series=tuple((why, f"kvstore_peer_failures_{why}_total") for why in FETCH_FAILURES),
    ),
    Metric(
        "kvstore_peer_quarantined_bytes",
        "gauge",
        "slots set aside: a link that broke may still write to them",
        part="peer",
    ),
    Metric("kvstore_peer_sessions", "gauge", "connected to other daemons as a peer", part="peer"),
)

CLIENT_METRICS: tuple[Metric, ...] = (
    Metric(
        "kvstore_unavailable_calls_total",
        "counter",
        "calls answered as misses: the daemon was away",
        part="client",
    ),
    Metric("kvstore_reconnects_total", "counter", "times the daemon came back", part="client"),
)

METRICS = STORE_METRICS + DAEMON_METRICS + PEER_METRICS + CLIENT_METRICS


_PREFIX, _SUFFIX = "kvstore_", "_total"


class Counters:
    """Counters by key, without `kvstore_` and `_total`. Thread-safe.

    Those of one part; `metrics` in place of a part's own where somebody counts for several.
    """

    def __init__(self, metrics: tuple[Metric, ...] = STORE_METRICS) -> None:
        self._lock = threading.Lock()
        self._values = {
            key.removeprefix(_PREFIX).removesuffix(_SUFFIX): 0
            for metric in metrics
            if metric.kind == "counter"
            for key in metric.stats_keys()
        }

    def add(self, name: str, value: int = 1) -> None:
        """Add to `kvstore_<name>_total`. Raises KeyError for a name that is not declared."""
        with self._lock:
            self._values[name] += value

    def add_load(
        self, queried: int, hit_cpu: int, hit_ssd: int, num_bytes: int, block_tokens: int = 0
    ) -> None:
        """Count one load or acquire, in blocks of one size; under one lock: the smallest takes
        10 us.
        """
        hit = hit_cpu + hit_ssd
        with self._lock:
            values = self._values
            values["queried_blocks"] += queried
            values["hit_cpu_blocks"] += hit_cpu
            values["hit_ssd_blocks"] += hit_ssd
            values["missed_blocks"] += queried - hit
            values["loaded_bytes"] += num_bytes
            values["queried_tokens"] += queried * block_tokens
            values["hit_cpu_tokens"] += hit_cpu * block_tokens
            if hit_ssd:
                values["hit_ssd_tokens"] += hit_ssd * block_tokens
                values["loaded_ssd_bytes"] += num_bytes // hit * hit_ssd

    def add_missed(self, reason: str, blocks: int) -> None:
        """Say why `blocks` that were, or will be, counted as missed were so."""
        if blocks:
            self.add(f"missed_{reason}_blocks", blocks)

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return {f"{_PREFIX}{name}{_SUFFIX}": value for name, value in self._values.items()}


def _row(metric: Metric) -> str:
    keys = ""
    if metric.series:
        label = metric.labels[0]
        pairs = [f"{label}={value}: `{key}`" for value, key in metric.series]
        if metric.sum_key:
            pairs = [f"all: `{metric.sum_key}`", *pairs, f"{label}={metric.rest}: what is left"]
        keys = ", ".join(pairs)
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} | {keys} |"


def metrics_page() -> str:
    """Return docs/METRICS.md."""
    lines = [
        "# Metrics",
        "",
        "Generated from `kvstore/metrics.py`; `tests/test_tidy.py` keeps the two alike.",
        "",
        "A daemon's `/metrics` has them by name and label. `kvstore.Store.stats()` and the status",
        "of a daemon are flat: a metric without labels is there under its name, one with a label",
        "under the key in the last column. Of a part that is not there (no ssd tier), nothing is",
        "exposed. `queried = hit + missed` holds in blocks, and missed is the sum of its reasons.",
    ]
    for title, metrics in (
        ("Of the tiers, embedded or in a daemon", STORE_METRICS),
        ("Of a daemon", DAEMON_METRICS),
        ("Of fetches from other daemons, where there is a `peer_token`", PEER_METRICS),
        ("Of a client, in its own `stats()` only", CLIENT_METRICS),
    ):
        lines += ["", f"## {title}", "", "| name | kind | labels | what | keys in `stats()` |"]
        lines += ["|---|---|---|---|---|", *map(_row, metrics)]
    lines += [
        "",
        "Besides these: `process_*` (memory, descriptors, CPU time, start) of the daemon.",
        "",
    ]
    return "\n".join(lines)
