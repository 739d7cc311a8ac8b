"""What a daemon counts, as Prometheus metrics and as quantiles for people.

All values of one scrape come from one call of `status()` and one of `latencies()`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from kvstore.metrics import METRICS, Metric

# Of one operation: requests in each bucket (one more than there are bounds), sum of seconds.
Latency = tuple[Sequence[int], float]
Samples = Iterator[tuple[tuple[str, ...], float]]

SERVING = "serving"

_ADOPTED = {
    "kvstore_adopted_blocks": "adopted",
    "kvstore_discarded_slots": "discarded",
    "kvstore_adoption_seconds": "seconds",
}


class Served(Protocol):
    """What HTTP needs of the daemon. All of it is thread-safe, and answers without I/O."""

    @property
    def state(self) -> str:
        """SERVING, or what it does instead: "adopting", "draining"."""
        ...

    @property
    def latency_bounds(self) -> Sequence[float]:
        """Upper ends of the buckets of `latencies`, in seconds, ascending, without infinity."""
        ...

    def status(self) -> dict[str, Any]:
        """Everything known of the daemon, as `kvstore.status.Status` has it."""
        ...

    def latencies(self) -> Mapping[str, Latency]:
        """Return the latencies of each operation since the start."""
        ...


def _latency_family(metric: Metric, service: Served) -> Family:
    family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    names = [*map(floatToGoString, service.latency_bounds), "+Inf"]
    for op, (counts, seconds) in sorted(service.latencies().items()):
        if not any(counts):  # two dozen series each: only of operations that are used
            continue
        buckets, below = [], 0
        for name, count in zip(names, counts, strict=True):
            below += count
            buckets.append((name, float(below)))
        family.add_metric([op], buckets, seconds)
    return family


def _tenant_samples(metric: Metric, tenants: Iterable[Mapping[str, Any]]) -> Samples:
    for tenant in tenants:
        name = str(tenant["name"])
        if metric.name == "kvstore_tenant_blocks":
            yield (name,), tenant["blocks"]
            continue
        what = "used" if metric.name == "kvstore_tenant_used_bytes" else "quota"
        for tier in ("cpu", "ssd"):
            value = tenant.get(f"{tier}_{what}_bytes")
            if value is not None and (value or what == "used"):
                yield (name, tier), value


def _samples(metric: Metric, status: Mapping[str, Any]) -> Samples:
    if metric.source == "tenants":
        yield from _tenant_samples(metric, status.get("tenants", ()))
    elif metric.source == "state":
        yield (), float(status["state"] == SERVING)
    elif metric.source == "version":
        yield (str(status["version"]),), 1.0
    else:
        values = dict(status.get("metrics", {}))
        # Counts that a status has at its top, under their own names.
        for key in ("leases", "reservations", "quarantined_slots"):
            if isinstance(status.get(key), (int, float)):
                values.setdefault(f"kvstore_{key}", status[key])
        values.setdefault("kvstore_clients", len(status.get("clients", ())))
        for key, name in _ADOPTED.items():
            if name in (adopted := status.get("adopted") or {}):
                values.setdefault(key, adopted[name])
        yield from metric.samples(values)


class ServiceCollector(Collector):
    """Reads one snapshot of a daemon for each scrape."""

    def __init__(self, service: Served) -> None:
        self._service = service

    def describe(self) -> Iterable[Family]:
        return ()  # what there is depends on the daemon: no ssd, no tenants

    def collect(self) -> Iterable[Family]:
        status = self._service.status()
        for metric in METRICS:
            if metric.part == "client":
                continue
            if metric.kind == "histogram":
                yield _latency_family(metric, self._service)
                continue
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.help, labels=metric.labels)
            for labels, value in _samples(metric, status):
                family.add_metric(labels, value)
            if family.samples:
                yield family


def registry_of(service: Served) -> CollectorRegistry:
    """Return a registry of this daemon's metrics and of its process's."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServiceCollector(service))
    ProcessCollector(registry=registry)
    return registry


def _quantile(bounds: Sequence[float], counts: Sequence[int], part: float) -> float:
    """Return the value below which `part` of the requests lie, linear within a bucket.

    Of what lies above the last bound only that bound is known.
    """
    rank = part * sum(counts)
    below, low = 0.0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and below + count >= rank:
            return low + (bound - low) * (rank - below) / count
        below, low = below + count, bound
    return low


def latency_rows(service: Served) -> list[dict[str, Any]]:
    """Return for each operation used: op, count, p50_seconds, p99_seconds, mean_seconds."""
    bounds = service.latency_bounds
    rows = []
    for op, (counts, seconds) in service.latencies().items():
        if num := sum(counts):
            rows.append(
                {
                    "op": op,
                    "count": num,
                    "p50_seconds": _quantile(bounds, counts, 0.5),
                    "p99_seconds": _quantile(bounds, counts, 0.99),
                    "mean_seconds": seconds / num,
                }
            )
    return sorted(rows, key=lambda row: -row["count"])
