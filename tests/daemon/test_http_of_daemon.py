"""HTTP of a daemon that is really there: what it counts is declared, and what it says is exposed.

A Service in this process with an ssd, a quota and a collector for traces; no made-up status.
"""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore import tracing
from kvstore.config import DaemonConfig
from kvstore.daemon.exposition import Served
from kvstore.daemon.service import Service
from kvstore.metrics import METRICS
from tests.daemon.test_http import lint, values_of

DECLARED = {key for metric in METRICS for key in metric.stats_keys()}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    config = DaemonConfig(
        cpu="4MiB",
        chunk="1MiB",
        ssd=str(tmp_path / "ssd"),
        ssd_capacity="16MiB",
        ssd_segment="1MiB",
        listen=f"unix:{tmp_path / 'kvstore.sock'}",
        http="127.0.0.1:0",
        hold_seconds=0.0,
        tenants={"research": {"uids": [4_000_000], "cpu_quota": "1MiB"}},  # type: ignore[dict-item]
    )
    with Service(config) as made:
        yield made


def get(service: Service, path: str) -> tuple[int, str]:
    (address,) = [a for a in service.addresses if a.startswith("http://")]
    connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=10)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def test_the_daemon_is_what_http_asks_for(service: Service) -> None:
    served: Served = service
    assert served.state == "serving"
    assert list(served.latency_bounds) == sorted(served.latency_bounds)
    for counts, seconds in served.latencies().values():
        assert len(counts) == len(served.latency_bounds) + 1
        assert seconds >= 0


def test_every_value_of_the_daemon_is_declared(service: Service) -> None:
    assert set(service.status()["metrics"]) <= DECLARED


def test_its_metrics_pass_the_lint(service: Service) -> None:
    status, text = get(service, "/metrics")
    assert status == 200
    assert lint(text) == []
    found = values_of(text)
    assert found['kvstore_tier_capacity_bytes{tier="cpu"}'] == 4 << 20
    assert found['kvstore_tier_capacity_bytes{tier="ssd"}'] == 16 << 20
    assert found['kvstore_tenant_quota_bytes{tenant="research",tier="cpu"}'] == 1 << 20
    assert found["kvstore_ready"] == 1


def test_its_status_is_json(service: Service) -> None:
    status, text = get(service, "/status.json")
    assert status == 200
    assert json.loads(text)["state"] == "serving"
    assert [row["name"] for row in json.loads(text)["tenants"]] == ["", "research"]


def test_ready_and_health_of_a_serving_daemon(service: Service) -> None:
    assert get(service, "/ready")[0] == get(service, "/health")[0] == 200


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_in_it(service: Service) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=get(service, "/metrics")[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_setting_trace_turns_tracing_on_and_the_end_off(tmp_path: Path) -> None:
    config = DaemonConfig(
        cpu="1MiB",
        listen=f"unix:{tmp_path / 'kvstore.sock'}",
        http="",
        hold_seconds=0.0,
        trace="http://127.0.0.1:9",
    )
    off = tracing.span("a")
    with Service(config):
        assert tracing.span("a") is not off
    assert tracing.span("a") is off
