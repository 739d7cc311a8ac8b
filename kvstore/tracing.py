"""Spans of slow work for OpenTelemetry. Off until `enable` or `export_to`; off, a span costs one
look at a variable, and nothing of OpenTelemetry is imported.

What has spans: load and put of a store; in a daemon (or an embedded store with an ssd) promotion,
batches of write-behind, taking over an arena, rounds of the scrubber. A span is named
`kvstore.<what>`, its attributes `kvstore.<unit>`. It ends with the error that ended the work.

Traces do not cross the socket: a client's load and the promotion that it waited for are two traces.

One switch for the process: an engine that has set up OpenTelemetry calls `enable()`, the daemon
calls `export_to` with its setting `trace`. Thread-safe; the switch may be turned at any time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider as SdkTracerProvider
    from opentelemetry.trace import Tracer, TracerProvider

P = ParamSpec("P")
R = TypeVar("R")
Attributes = Mapping[str, "str | int | float | bool"]

QUEUED_SPANS_MAX = 2048  # over it, spans are dropped: nobody waits for a collector
EXPORT_SECONDS = 2.0  # for one batch to be taken by the collector


class _Switch:
    """Off while `tracer` is None."""

    tracer: Tracer | None = None


_SWITCH = _Switch()


class Span(Protocol):
    """What a `with span(...)` gives."""

    def set(self, **attributes: str | int | float | bool) -> None:
        """Add attributes `kvstore.<name>`."""
        ...


class _Nothing:
    """A span while tracing is off. Holds nothing, so one serves all threads."""

    __slots__ = ()

    def set(self, **attributes: str | int | float | bool) -> None:
        pass

    def __enter__(self) -> Span:
        return self

    def __exit__(self, *_: object) -> None:
        pass


_NOTHING = _Nothing()


class _Live:
    __slots__ = ("_context", "_span")

    def __init__(self, tracer: Tracer, name: str) -> None:
        self._context: Any = tracer.start_as_current_span(f"kvstore.{name}")
        self._span: Any = None

    def set(self, **attributes: str | int | float | bool) -> None:
        for name, value in attributes.items():
            self._span.set_attribute(f"kvstore.{name}", value)

    def __enter__(self) -> Span:
        self._span = self._context.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._context.__exit__(kind, error, traceback)


def span(name: str) -> _Live | _Nothing:
    """Return a context whose time is a span `kvstore.<name>`, child of the one it is in."""
    tracer = _SWITCH.tracer
    return _NOTHING if tracer is None else _Live(tracer, name)


def note(name: str, seconds: float, **attributes: str | int | float | bool) -> None:
    """Make a span of work that took `seconds` and ends now: work done in slices."""
    tracer = _SWITCH.tracer
    if tracer is not None:
        named = {f"kvstore.{key}": value for key, value in attributes.items()}
        end = time.time_ns()
        live = tracer.start_span(
            f"kvstore.{name}", start_time=end - int(seconds * 1e9), attributes=named
        )
        live.end(end)


def traced(
    name: str, describe: Callable[..., Attributes] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make each call of a function a span.

    Args:
        name: the span is `kvstore.<name>`.
        describe: attributes, from the result and the positional arguments; called while on only.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            tracer = _SWITCH.tracer
            if tracer is None:
                return function(*args, **kwargs)
            with _Live(tracer, name) as live:
                result = function(*args, **kwargs)
                if describe is not None:
                    live.set(**describe(result, *args))
                return result

        return wrapper

    return decorate


def enable(provider: TracerProvider | None = None) -> None:
    """Trace with `provider`; default: the one that this process has set up for OpenTelemetry.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry import trace
    except ImportError:
        raise ConfigError("trace: needs OpenTelemetry: pip install 'kvstore-llm[otel]'") from None
    _SWITCH.tracer = trace.get_tracer("kvstore", tracer_provider=provider)


def disable() -> None:
    """Trace no more. Spans that are open end as they would have."""
    _SWITCH.tracer = None


class Exporting:
    """Sends spans to a collector in background, until `close`."""

    def __init__(self, provider: SdkTracerProvider) -> None:
        self._provider: SdkTracerProvider | None = provider
        enable(provider)

    def close(self) -> None:
        """Trace no more; send what is queued, in bounded time. Safe to call twice."""
        disable()
        provider, self._provider = self._provider, None
        if provider is not None:
            provider.force_flush(int(EXPORT_SECONDS * 1000))
            provider.shutdown()

    def __enter__(self) -> Exporting:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def export_to(endpoint: str, service: str = "kvstored") -> Exporting:
    """Send spans to an OTLP collector over HTTP, such as "http://127.0.0.1:4318".

    A collector that does not answer costs spans, never a call's time.

    Raises:
        ConfigError: OpenTelemetry is not installed, or the endpoint is no http address.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"trace: {endpoint!r} is not of the form http://host:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError("trace: needs OpenTelemetry: pip install 'kvstore-llm[otel]'") from None
    exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
    provider = TracerProvider(
        resource=Resource.create({"service.name": service}), shutdown_on_exit=False
    )
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter,
            max_queue_size=QUEUED_SPANS_MAX,
            export_timeout_millis=EXPORT_SECONDS * 1000,
        )
    )
    return Exporting(provider)
