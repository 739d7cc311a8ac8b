"""Spans: off they are nothing, on they name the work, and a collector that is away costs nobody.

Stores do real work under OpenTelemetry's in-memory exporter; the daemon's way out is proved
against an HTTP server that decodes what it gets.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

import kvstore
from kvstore import tracing
from kvstore.errors import ConfigError
from tests.store_support import NAMESPACE, SLOTS, WAIT_S, chain, load, open_store, put


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    memory = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracing.enable(provider)
    yield memory
    tracing.disable()
    provider.shutdown()


def of(spans: InMemorySpanExporter, name: str) -> list[Any]:
    return [span for span in spans.get_finished_spans() if span.name == name]


def test_load_and_put_are_spans_with_their_blocks(spans: InMemorySpanExporter) -> None:
    with kvstore.open(NAMESPACE, cpu="1MiB") as store:
        put(store, chain(1, 3))
        assert load(store, chain(1, 5)) == 3
    (stored,) = of(spans, "kvstore.put")
    (loaded,) = of(spans, "kvstore.load")
    assert dict(stored.attributes) == {"kvstore.blocks": 3}
    assert dict(loaded.attributes) == {"kvstore.blocks": 5, "kvstore.loaded_blocks": 3}


def test_what_the_ssd_does_in_background_are_spans(
    spans: InMemorySpanExporter, tmp_path: Path
) -> None:
    with open_store(tmp_path) as store:
        for seed in range(3):
            put(store, chain(seed, SLOTS), ack="ssd")
        assert load(store, chain(0, SLOTS), timeout=WAIT_S) == SLOTS
    with open_store(tmp_path):
        pass
    written = of(spans, "kvstore.write_batch")
    assert sum(span.attributes["kvstore.blocks"] for span in written) == 3 * SLOTS
    assert of(spans, "kvstore.promote")
    assert of(spans, "kvstore.restore")[-1].attributes["kvstore.blocks"] > 0


def test_a_span_has_its_parent_and_its_error(spans: InMemorySpanExporter) -> None:
    @tracing.traced("inner")
    def fail() -> None:
        raise ConfigError("cpu: no")

    def work() -> None:
        with tracing.span("outer") as outer:
            outer.set(blocks=3, tier="cpu")
            fail()

    with pytest.raises(ConfigError):
        work()
    (inner,), (around,) = of(spans, "kvstore.inner"), of(spans, "kvstore.outer")
    assert inner.parent.span_id == around.context.span_id
    assert inner.status.status_code == StatusCode.ERROR
    assert inner.events[0].attributes["exception.message"] == "cpu: no"
    assert dict(around.attributes) == {"kvstore.blocks": 3, "kvstore.tier": "cpu"}


def test_work_in_slices_is_one_span_of_its_whole_time(spans: InMemorySpanExporter) -> None:
    tracing.note("scrub", 2.5, bytes=4096)
    (span,) = of(spans, "kvstore.scrub")
    assert span.end_time - span.start_time == 2_500_000_000
    assert dict(span.attributes) == {"kvstore.bytes": 4096}
    tracing.disable()
    tracing.note("scrub", 1.0)
    assert len(of(spans, "kvstore.scrub")) == 1


def test_off_there_are_no_spans_and_nothing_is_described(spans: InMemorySpanExporter) -> None:
    def describe(*_: object) -> dict[str, int]:
        raise AssertionError

    @tracing.traced("work", describe)
    def work(value: int) -> int:
        return value + 1

    tracing.disable()
    assert work(2) == 3
    with tracing.span("outer") as outer:
        outer.set(blocks=1)
    assert tracing.span("a") is tracing.span("b")
    assert spans.get_finished_spans() == ()


def test_a_span_that_is_open_when_tracing_ends_ends_well(spans: InMemorySpanExporter) -> None:
    with tracing.span("outer") as outer:
        tracing.disable()
        outer.set(blocks=1)
    assert len(of(spans, "kvstore.outer")) == 1


def test_without_the_switch_nothing_of_opentelemetry_is_imported() -> None:
    script = (
        "import sys, numpy as np, kvstore\n"
        "spec = kvstore.BlockSpec(1, 1, 64, block_tokens=16, dtype='float32')\n"
        "with kvstore.open(kvstore.Namespace('m', spec), cpu='1MiB') as store:\n"
        "    store.put(kvstore.hash_blocks(np.arange(16), 16),\n"
        "              kvstore.ContiguousBlocks(np.zeros((1, spec.block_bytes), np.uint8)))\n"
        "print([m for m in sys.modules if m.startswith(('opentelemetry', 'requests'))])\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["opentelemetry", "opentelemetry.sdk.trace.export"])
def test_without_the_extra_the_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"trace: .*kvstore-llm\[otel\]"):
        tracing.export_to("http://127.0.0.1:4318")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "grpc://127.0.0.1:4317", ""])
def test_an_endpoint_that_is_no_http_address_is_named(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="trace"):
        tracing.export_to(endpoint)


def test_spans_reach_a_collector() -> None:
    received: list[tuple[str, ExportTraceServiceRequest]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            with (
                tracing.export_to(f"http://127.0.0.1:{collector.server_port}/"),
                tracing.span("adopt") as span,
            ):
                span.set(blocks=7)
        finally:
            collector.shutdown()
            thread.join()
    ((path, request),) = received
    assert path == "/v1/traces"
    (of_service,) = request.resource_spans
    names = {a.key: a.value.string_value for a in of_service.resource.attributes}
    assert names["service.name"] == "kvstored"
    (sent,) = of_service.scope_spans[0].spans
    assert sent.name == "kvstore.adopt"
    assert sent.attributes[0].value.int_value == 7


def test_a_collector_that_is_away_loses_spans_only() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        exporting = tracing.export_to(f"http://127.0.0.1:{unheard.getsockname()[1]}")
        for _ in range(10):
            with tracing.span("work"):
                pass
        exporting.close()
        exporting.close()
    assert tracing.span("a") is tracing.span("b"), "off again"
