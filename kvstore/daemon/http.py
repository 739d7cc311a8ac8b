"""HTTP of the daemon: metrics, health, status, and a page for people.

    /metrics      Prometheus text, or OpenMetrics where the scraper asks for it
    /health       200 while the process lives
    /ready        200 while it serves, else 503 with what it does instead
    /status.json  everything, for programs
    /             the same for people: one file, nothing from elsewhere

It reads only: GET and HEAD. Bound to loopback it is open to users of this machine. Bound to
anything else it needs a token: /metrics and /status.json then ask for it as
`Authorization: Bearer`; /health, /ready and the page, which say nothing of what is stored, do not.
A web page of somebody else cannot read it through a name that it lets point here (DNS rebinding):
without a token only requests to an address or to localhost are answered.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import hmac
import importlib.resources
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
from prometheus_client.exposition import choose_encoder
from waitress import wasyncore
from waitress.server import create_server

from kvstore.address import is_loopback, tcp_address
from kvstore.daemon.exposition import SERVING, Served, latency_rows, registry_of
from kvstore.errors import ConfigError, InUseError, KVStoreError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

THREADS = 2  # a scrape and a person; requests take milliseconds
CONNECTIONS_MAX = 64
QUIET_SECONDS = 30  # after which an idle connection is closed
HEADER_BYTES_MAX = 16 << 10
BODY_BYTES_MAX = 1 << 10  # nothing that is answered has one

_CLOSE_SECONDS = 5.0
_JSON, _HTML = "application/json", "text/html; charset=utf-8"
_SHARED_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-store"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Frame-Options", "DENY"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
_NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

Reply = tuple[str, str, bytes]  # status line, type, body
Route = Callable[["WSGIEnvironment"], Reply]


@functools.cache
def page() -> bytes:
    """Return the status page."""
    return importlib.resources.files(__package__).joinpath("page.html").read_bytes()


@functools.cache
def page_policy() -> str:
    """Return a content policy that allows the page's own script and style, and nothing else."""

    def sources(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page().decode(), re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in found)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"{_NOTHING}; connect-src 'self'; img-src data:; "
        f"script-src {sources('script')}; style-src {sources('style')}"
    )


def _json(status: str, value: Any) -> Reply:
    return status, _JSON, msgspec.json.encode(value)


class HttpApp:
    """The WSGI application. Thread-safe: it holds nothing that changes."""

    def __init__(self, service: Served, token: bytes | None = None) -> None:
        """`token`: what /metrics and /status.json ask for; None: nothing."""
        self._service = service
        self._token = token
        self._registry = registry_of(service)
        self._open: dict[str, Route] = {
            "/": lambda _: ("200 OK", _HTML, page()),
            "/health": lambda _: _json("200 OK", {"alive": True}),
            "/ready": self._ready,
        }
        self._guarded: dict[str, Route] = {
            "/metrics": self._metrics,
            "/status.json": self._status,
        }

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        extra: list[tuple[str, str]] = []
        try:
            status, kind, body = self._answer(environ, extra)
        except KVStoreError as error:  # closing while we asked
            status, kind, body = _json("503 Service Unavailable", {"error": str(error)})
        policy = page_policy() if kind == _HTML else _NOTHING
        headers = [("Content-Type", kind), ("Content-Length", str(len(body)))]
        headers += [("Content-Security-Policy", policy), *_SHARED_HEADERS, *extra]
        start_response(status, headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _answer(self, environ: WSGIEnvironment, extra: list[tuple[str, str]]) -> Reply:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            extra.append(("Allow", "GET, HEAD"))
            return _json("405 Method Not Allowed", {"error": "only GET and HEAD"})
        if self._token is None and not is_address(environ.get("HTTP_HOST", "")):
            return _json(
                "421 Misdirected Request", {"error": "Host: neither an address nor localhost"}
            )
        path = environ.get("PATH_INFO", "")
        if path in self._open:
            return self._open[path](environ)
        if path not in self._guarded:
            paths = [*self._open, *self._guarded]
            return _json("404 Not Found", {"error": "no such page", "pages": paths})
        if not self._is_allowed(environ):
            extra.append(("WWW-Authenticate", 'Bearer realm="kvstore"'))
            return _json("401 Unauthorized", {"error": "Authorization: no valid bearer token"})
        return self._guarded[path](environ)

    def _is_allowed(self, environ: WSGIEnvironment) -> bool:
        if self._token is None:
            return True
        # WSGI hands header bytes over as latin-1.
        kind, _, given = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        matches = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._token)
        return kind.lower() == "bearer" and matches

    def _ready(self, _: WSGIEnvironment) -> Reply:
        state = self._service.state
        line = "200 OK" if state == SERVING else "503 Service Unavailable"
        return _json(line, {"ready": state == SERVING, "state": state})

    def _status(self, _: WSGIEnvironment) -> Reply:
        return _json("200 OK", {**self._service.status(), "latency": latency_rows(self._service)})

    def _metrics(self, environ: WSGIEnvironment) -> Reply:
        encode, kind = choose_encoder(environ.get("HTTP_ACCEPT", ""))
        return "200 OK", kind, encode(self._registry)


def is_address(host: str) -> bool:
    """Whether a Host header names an address or localhost, which no DNS server can redirect."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::\d{1,5})?", host)
    if match is None:
        return False
    if match[2] is not None and match[2].lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(match[1] or match[2])
    except ValueError:
        return False
    return True


class HttpServer:
    """A listening socket, one thread that waits and THREADS that answer.

    Thread safety: `close` may be called from any thread, more than once.
    """

    def __init__(self, app: HttpApp, listener: socket.socket) -> None:
        self._listener = listener
        self._where: tuple[str, int] = listener.getsockname()[:2]
        self._server = create_server(
            app,
            sockets=[listener],
            threads=THREADS,
            connection_limit=CONNECTIONS_MAX,
            channel_timeout=QUIET_SECONDS,
            cleanup_interval=QUIET_SECONDS // 2,
            max_request_header_size=HEADER_BYTES_MAX,
            max_request_body_size=BODY_BYTES_MAX,
            asyncore_use_poll=True,
            clear_untrusted_proxy_headers=True,
            ident="",
        )
        self._thread = threading.Thread(target=self._run, name="kvstore-http", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where it listens, as "host:port"."""
        host, port = self._where
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _run(self) -> None:
        wasyncore.loop(timeout=1.0, use_poll=True, map=self._server._map)
        self._server.task_dispatcher.shutdown(timeout=_CLOSE_SECONDS)

    def close(self) -> None:
        """Stop listening, end all connections and threads."""
        if self._thread.is_alive():
            # In the thread that owns them; when none is left, its loop ends. It may do so, woken by
            # a request that ends, before we come to wake it: then its pipe is closed already.
            with contextlib.suppress(OSError):
                self._server.trigger.pull_trigger(lambda: wasyncore.close_all(self._server._map))
            self._thread.join(_CLOSE_SECONDS)
        self._listener.close()

    def __enter__(self) -> HttpServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _listen(address: str) -> socket.socket:
    host, port = tcp_address(address)
    try:
        family, _, _, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"http: {address}: {error}") from error
    try:
        if port:  # else the kernel may give us a port that another is about to listen on
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
    except OSError as error:
        listener.close()
        raise InUseError(f"http: cannot listen on {address}: {error.strerror}") from error
    return listener


def start_http(service: Served, address: str, token: bytes | None = None) -> HttpServer:
    """Serve a daemon's metrics and status on "host:port" until `close`.

    Args:
        service: the daemon.
        address: where to listen; port 0 takes a free one.
        token: what is asked for beyond loopback. On loopback it is not.

    Raises:
        ConfigError: no such address, or it is reachable from elsewhere and there is no token.
        InUseError: the address cannot be bound.
    """
    host, _ = tcp_address(address)
    is_local = is_loopback(host)
    if not is_local and not token:
        raise ConfigError(f"http: {address} is reachable from other hosts: set token_file")
    return HttpServer(HttpApp(service, None if is_local else token), _listen(address))
