"""HTTP of the daemon: each route, who may ask, and what it says in which state.

A real server on a free loopback port around a made-up daemon, asked with http.client. /metrics is
parsed with prometheus_client and held to the rules that promtool checks, so that they hold where
promtool is not installed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvstore.daemon.exposition import latency_rows
from kvstore.daemon.http import HttpApp, HttpServer, _listen, is_address, page, start_http
from kvstore.errors import ConfigError, InUseError, StoreClosedError
from kvstore.metrics import METRICS, Metric
from tests.daemon.served import METRIC_VALUES, FakeService

TOKEN = b"correct horse battery staple"


@dataclass
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        assert self.headers["Content-Type"] == "application/json"
        return json.loads(self.body)


def ask(
    server: HttpServer, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> Reply:
    host, _, port = server.address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request(method, path, headers=headers or {})
        reply = connection.getresponse()
        return Reply(reply.status, reply.headers, reply.read())
    finally:
        connection.close()


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def server(service: FakeService) -> Iterator[HttpServer]:
    with start_http(service, "127.0.0.1:0") as started:
        yield started


@pytest.fixture
def guarded(service: FakeService) -> Iterator[HttpServer]:
    """What listens beyond loopback, but for where it listens."""
    with HttpServer(HttpApp(service, TOKEN), _listen("127.0.0.1:0")) as started:
        yield started


# --- routes


def test_health_answers_in_every_state(server: HttpServer, service: FakeService) -> None:
    for state in ("adopting", "serving", "draining"):
        service.state = state
        assert ask(server, "/health").status == 200


def test_ready_only_while_serving_and_says_why_not(
    server: HttpServer, service: FakeService
) -> None:
    assert ask(server, "/ready").json == {"ready": True, "state": "serving"}
    for state in ("adopting", "draining"):
        service.state = state
        reply = ask(server, "/ready")
        assert (reply.status, reply.json) == (503, {"ready": False, "state": state})


def test_status_is_the_daemons_with_latencies(server: HttpServer, service: FakeService) -> None:
    found = ask(server, "/status.json").json
    latency = found.pop("latency")
    assert found == json.loads(json.dumps(service.status()))
    assert [row["op"] for row in latency] == ["acquire", "lookup"]
    assert latency[0]["count"] == 100


def test_a_ratio_of_nothing_is_null_in_json(server: HttpServer, service: FakeService) -> None:
    service.values["rates"]["hit_ratio"] = float("nan")
    assert ask(server, "/status.json").json["rates"]["hit_ratio"] is None


def test_quantiles_lie_in_their_bucket(service: FakeService) -> None:
    rows = {row["op"]: row for row in latency_rows(service)}
    assert 2.5e-5 < rows["acquire"]["p50_seconds"] <= 5e-5
    assert 2.5e-4 >= rows["acquire"]["p99_seconds"] > 1e-4
    assert rows["lookup"]["p99_seconds"] <= 1e-5
    assert rows["acquire"]["mean_seconds"] == pytest.approx(0.019)


def test_the_page_brings_everything_with_it(server: HttpServer) -> None:
    reply = ask(server, "/")
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
    text = reply.body.decode()
    outside = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//[^"')\s]+""", text)
    assert outside == []
    assert "innerHTML" not in text
    assert "insertAdjacentHTML" not in text
    assert "document.write" not in text
    assert not re.search(r"\son[a-z]+=", text)


def test_the_policy_allows_exactly_the_pages_script_and_style(server: HttpServer) -> None:
    policy = ask(server, "/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert policy.count("'sha256-") == page().count(b"<script>") + page().count(b"<style>") == 2


def test_every_reply_carries_the_security_headers(server: HttpServer) -> None:
    for path in ("/", "/health", "/ready", "/metrics", "/status.json", "/nothing"):
        headers = ask(server, path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Frame-Options"] == "DENY"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["Access-Control-Allow-Origin"] is None
        assert "waitress" not in (headers["Server"] or "").lower()


@pytest.mark.parametrize("path", ["/nothing", "/metrics/", "/../etc/passwd", "/%2e%2e/x"])
def test_unknown_paths_are_404_in_json(server: HttpServer, path: str) -> None:
    reply = ask(server, path)
    assert reply.status == 404
    assert "/metrics" in reply.json["pages"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"])
def test_only_get_and_head(server: HttpServer, method: str) -> None:
    reply = ask(server, "/status.json", method)
    assert reply.status == 405
    assert reply.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/status.json", "/nothing"])
def test_head_is_get_without_the_body(server: HttpServer, path: str) -> None:
    head, get = ask(server, path, "HEAD"), ask(server, path)
    assert head.body == b""
    assert head.status == get.status
    assert head.headers["Content-Type"] == get.headers["Content-Type"]
    assert int(head.headers["Content-Length"]) > 0


def test_a_daemon_that_closes_meanwhile_is_unavailable(
    server: HttpServer, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed() -> dict[str, Any]:
        raise StoreClosedError("the store is closed")

    monkeypatch.setattr(service, "status", closed)
    for path in ("/status.json", "/metrics"):
        reply = ask(server, path)
        assert (reply.status, reply.json) == (503, {"error": "the store is closed"})
    assert ask(server, "/health").status == 200


# --- who may ask


@pytest.mark.parametrize(
    ("host", "is_good"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:9470", True),
        ("localhost:9470", True),
        ("LOCALHOST", True),
        ("[::1]:9470", True),
        ("192.168.1.7:80", True),
        ("evil.example", False),
        ("evil.example:9470", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1:9470@evil.example", False),
        ("[evil]:1", False),
        ("", False),
        ("127.0.0.1:", False),
    ],
)
def test_names_that_dns_could_redirect_are_refused(host: str, is_good: bool) -> None:
    assert is_address(host) == is_good


def test_a_rebound_name_reads_nothing(server: HttpServer) -> None:
    for path in ("/", "/metrics", "/status.json", "/health"):
        reply = ask(server, path, headers={"Host": "evil.example:9470"})
        assert reply.status == 421
        assert b"kvstore_" not in reply.body


@pytest.mark.parametrize("path", ["/metrics", "/status.json"])
def test_beyond_loopback_the_token_is_needed(guarded: HttpServer, path: str) -> None:
    good = TOKEN.decode()
    for value in (
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Basic {good}",
        good,
        f"Bearer {good}x",
    ):
        reply = ask(guarded, path, headers={"Authorization": value})
        assert reply.status == 401
        assert reply.headers["WWW-Authenticate"].startswith("Bearer")
        assert b"kvstore_" not in reply.body
    assert ask(guarded, path).status == 401
    assert ask(guarded, path, headers={"Authorization": "Bearer \xff\xfe"}).status == 401
    assert ask(guarded, path, headers={"Authorization": f"Bearer {good}"}).status == 200


def test_a_probe_needs_no_token_and_any_name(guarded: HttpServer) -> None:
    for path in ("/health", "/ready", "/"):
        assert ask(guarded, path, headers={"Host": "kvstored:9470"}).status == 200


def test_a_token_makes_names_good(guarded: HttpServer) -> None:
    headers = {"Host": "kvstored:9470", "Authorization": f"Bearer {TOKEN.decode()}"}
    assert ask(guarded, "/metrics", headers=headers).status == 200


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"])
def test_beyond_loopback_without_a_token_does_not_start(service: FakeService, address: str) -> None:
    with pytest.raises(ConfigError, match="token_file"):
        start_http(service, address)


def test_beyond_loopback_with_a_token_starts_and_asks_for_it(service: FakeService) -> None:
    with start_http(service, "0.0.0.0:0", TOKEN) as server:
        assert ask(server, "/metrics").status == 401


def test_on_loopback_a_token_is_not_asked_for(service: FakeService) -> None:
    with start_http(service, "127.0.0.1:0", TOKEN) as server:
        assert ask(server, "/metrics").status == 200


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.0.1:x", ":80", "127.0.0.1:99999"])
def test_a_bad_address_is_named(service: FakeService, address: str) -> None:
    with pytest.raises(ConfigError):
        start_http(service, address)


def test_an_address_in_use_is_named(server: HttpServer, service: FakeService) -> None:
    with pytest.raises(InUseError, match=re.escape(server.address)):
        start_http(service, server.address)


# --- the server


def test_close_frees_port_and_threads(service: FakeService) -> None:
    server = start_http(service, "127.0.0.1:0")
    assert ask(server, "/health").status == 200
    host, _, port = server.address.rpartition(":")
    idle = socket.create_connection((host, int(port)))
    server.close()
    server.close()
    with contextlib.suppress(ConnectionResetError):  # where it was not accepted yet
        assert idle.recv(1) == b""
    idle.close()
    names = [t.name for t in threading.enumerate()]
    assert not [name for name in names if "http" in name or "waitress" in name], names
    with start_http(service, server.address) as again:
        assert ask(again, "/health").status == 200


def test_long_headers_and_bodies_are_refused(server: HttpServer) -> None:
    assert ask(server, "/health", headers={"X-Long": "a" * 40_000}).status == 431
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999999999\r\n\r\n")
        assert b" 413 " in raw.recv(100)


def test_garbage_is_an_error_and_ends_only_its_connection(server: HttpServer) -> None:
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"\x16\x03\x01\x02\x00\r\n\r\n")
        assert b" 400 " in raw.recv(100)
    assert ask(server, "/health").status == 200


# --- metrics


def scrape(server: HttpServer) -> str:
    reply = ask(server, "/metrics")
    assert reply.headers["Content-Type"].startswith("text/plain; version=")
    return reply.body.decode()


def values_of(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_values_of_the_status_are_exposed_by_label(server: HttpServer) -> None:
    found = values_of(scrape(server))
    assert found['kvstore_hit_blocks_total{tier="cpu"}'] == 701_000
    assert found['kvstore_hit_blocks_total{tier="ssd"}'] == 102_345
    assert found['kvstore_integrity_failures_total{tier="cpu"}'] == 1
    assert found['kvstore_integrity_failures_total{tier="ssd"}'] == 2
    assert found['kvstore_tier_used_bytes{tier="ssd"}'] == 61 * (1 << 30)
    tenant = 'a"b\\c'
    assert found[f'kvstore_tenant_quota_bytes{{tenant="{tenant}",tier="cpu"}}'] == 4 << 30
    assert 'kvstore_tenant_quota_bytes{tenant="",tier="cpu"}' not in found
    assert found["kvstore_clients"] == 2
    assert found["kvstore_quarantined_slots"] == 4
    assert found["kvstore_ready"] == 1
    assert found['kvstore_build_info{version="0.2.0"}'] == 1
    assert found["kvstore_discarded_slots"] == 2
    assert found["kvstore_adoption_seconds"] == 0.21
    assert found["process_resident_memory_bytes"] > 0


def test_misses_are_the_sum_of_their_reasons_and_queries_of_all(server: HttpServer) -> None:
    found = values_of(scrape(server))
    by_reason = {k: v for k, v in found.items() if k.startswith("kvstore_missed_blocks_total{")}
    assert by_reason['kvstore_missed_blocks_total{reason="other"}'] == 22
    hits = sum(found[f'kvstore_hit_blocks_total{{tier="{tier}"}}'] for tier in ("cpu", "ssd"))
    assert found["kvstore_queried_blocks_total"] == hits + sum(by_reason.values())
    assert sum(by_reason.values()) == METRIC_VALUES["kvstore_missed_blocks_total"]


def test_what_is_not_there_is_not_exposed(server: HttpServer, service: FakeService) -> None:
    values = service.values["metrics"]
    service.values["metrics"] = {k: v for k, v in values.items() if "_ssd_" not in k}
    assert 'kvstore_tier_used_bytes{tier="ssd"}' not in values_of(scrape(server))


def test_not_ready_is_zero(server: HttpServer, service: FakeService) -> None:
    service.state = "draining"
    assert values_of(scrape(server))["kvstore_ready"] == 0


def test_openmetrics_on_request(server: HttpServer) -> None:
    reply = ask(server, "/metrics", headers={"Accept": "application/openmetrics-text"})
    assert reply.headers["Content-Type"].startswith("application/openmetrics-text")
    assert reply.body.endswith(b"# EOF\n")


UNIT_WORDS = {"ms", "us", "ns", "milliseconds", "kb", "mb", "gb", "kilobytes", "percent", "minutes"}


def lint(text: str) -> list[str]:
    """Return what is wrong with an exposition, by the rules of `promtool check metrics`."""
    problems = []
    series: Counter[str] = Counter()
    for line in text.splitlines():
        if line and not line.startswith("#"):
            series[line.rpartition(" ")[0]] += 1
    problems += [f"{name}: {times} times" for name, times in series.items() if times > 1]
    families = list(text_string_to_metric_families(text))
    names = Counter(family.name for family in families)
    problems += [f"{name}: declared {n} times" for name, n in names.items() if n > 1]
    for family in families:
        problems += lint_name(family)
        if family.type == "histogram":
            problems += lint_histogram(family)
    return problems


def lint_name(family: Any) -> list[str]:
    is_counter = family.type == "counter"
    name = family.name + ("_total" if is_counter else "")
    labels = {label for sample in family.samples for label in sample.labels}
    bad = {
        "no help": not family.documentation.strip(),
        "not snake case": not re.fullmatch(r"[a-z][a-z0-9_]*", name) or "__" in name,
        "_total is for counters": not is_counter and name.endswith("_total"),
        "a counter without _total": is_counter
        and any(not sample.name.endswith("_total") for sample in family.samples),
        "not a base unit": UNIT_WORDS & set(name.split("_")),
        "a label of histograms": family.type != "histogram" and labels & {"le", "quantile"},
        "below zero": family.type != "gauge" and any(s.value < 0 for s in family.samples),
    }
    return [f"{name}: {problem}" for problem, is_so in bad.items() if is_so]


def lint_histogram(family: Any) -> list[str]:
    problems = []
    of: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    for sample in family.samples:
        labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le"))
        entry = of.setdefault(labels, {"buckets": []})
        if sample.name.endswith("_bucket"):
            entry["buckets"].append((float(sample.labels["le"]), sample.value))
        else:
            entry[sample.name.rpartition("_")[2]] = sample.value
    for labels, entry in of.items():
        bounds = [bound for bound, _ in entry["buckets"]]
        counts = [count for _, count in entry["buckets"]]
        where = f"{family.name}{dict(labels)}"
        if bounds != sorted(bounds) or bounds[-1:] != [float("inf")]:
            problems.append(f"{where}: buckets do not ascend to +Inf")
        if counts != sorted(counts):
            problems.append(f"{where}: buckets are not cumulative")
        if entry.get("count") != counts[-1] or "sum" not in entry:
            problems.append(f"{where}: count or sum do not fit")
    return problems


def test_metrics_pass_the_lint(server: HttpServer) -> None:
    assert lint(scrape(server)) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# TYPE a_total counter\na_total 1\n", "no help"),
        ("# HELP a_total x\n# TYPE a_total gauge\na_total 1\n", "_total is for counters"),
        ("# HELP a x\n# TYPE a gauge\na 1\na 2\n", "2 times"),
        ("# HELP a_ms x\n# TYPE a_ms gauge\na_ms 1\n", "not a base unit"),
        (
            "# HELP h x\n# TYPE h histogram\n"
            'h_bucket{le="1"} 2\nh_bucket{le="+Inf"} 1\nh_sum 1\nh_count 1\n',
            "not cumulative",
        ),
        (
            '# HELP h x\n# TYPE h histogram\nh_bucket{le="1"} 1\nh_sum 1\nh_count 1\n',
            "do not ascend to +Inf",
        ),
    ],
)
def test_the_lint_finds_what_it_is_for(text: str, problem: str) -> None:
    assert any(problem in found for found in lint(text)), lint(text)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_declarations_follow_the_rules(metric: Metric) -> None:
    assert metric.name.startswith("kvstore_")
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.help
    assert not metric.help.endswith(".")
    if metric.series:
        assert len(metric.labels) == 1, "keys of stats() spell one label"
        assert metric.sum_key == "" or metric.rest
    for key in metric.stats_keys():
        assert key.endswith("_total") == (metric.kind == "counter")


def test_no_key_and_no_name_is_declared_twice() -> None:
    names = Counter(metric.name for metric in METRICS)
    keys = Counter(key for metric in METRICS for key in metric.stats_keys())
    assert [name for name, n in (names + Counter()).items() if n > 1] == []
    assert [key for key, n in keys.items() if n > 1] == []


def test_every_value_of_a_status_is_exposed(server: HttpServer, service: FakeService) -> None:
    """So that nobody adds to stats() what /metrics does not know."""
    declared = {key for metric in METRICS for key in metric.stats_keys()}
    assert set(service.values["metrics"]) <= declared
    assert set(METRIC_VALUES) <= declared


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing(server: HttpServer) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=scrape(server),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
