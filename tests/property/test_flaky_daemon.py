"""A store behind a connection that breaks, and that damages what it carries.

Between client and daemon stands a proxy that cuts connections after some bytes, and flips bits of
payload, by the word of Hypothesis. Proved: whatever comes of a load is exactly what
was put, or a miss; a put that says that it stored something has; nothing raises; and once the
connection is whole again so is the store.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvstore
from kvstore.daemon.server import Server
from kvstore.daemon.sockets import listen_tcp
from kvstore.daemon.tenants import Tenants
from kvstore.tiers.local import LocalControl
from tests.store_support import NAMESPACE, WAIT_S, chain, load, open_store, put

_PIECE_BYTES = 65536
# What is larger is payload but for its head; decisions have no checksum but TCP's.
_PAYLOAD_BYTES, _HEAD_BYTES = 16384, 64


class Proxy:
    """Carries TCP connections to `port`. Faults are spent on the bytes that come next."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._lock = threading.Lock()  # guards _cut_after and _flips
        self._cut_after: int | None = None  # bytes in either direction, then all is cut
        self._flips: list[int] = []  # bytes from the daemon, until a bit is flipped
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        thread.start()

    def harm(self, cut_after: int | None, flips: list[int]) -> None:
        with self._lock:
            self._cut_after = cut_after
            self._flips = list(flips)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._cut()
        for thread in self._threads:
            thread.join(WAIT_S)

    def _cut(self) -> None:
        for pair in list(self._pairs):
            for each in pair:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self._pairs.add((near, far))
                for ends in ((near, far, False), (far, near, True)):
                    self._start(self._carry, *ends)

    def _carry(self, source: socket.socket, sink: socket.socket, is_reply: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_PIECE_BYTES):
                sink.sendall(self._harmed(bytearray(data), is_reply))
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._pairs.discard((source, sink) if not is_reply else (sink, source))
        source.close()  # the sink is the other thread's source

    def _harmed(self, data: bytearray, is_reply: bool) -> bytearray:
        with self._lock:
            if is_reply:
                for flip in self._flips:
                    if _HEAD_BYTES <= flip < len(data) >= _PAYLOAD_BYTES:
                        data[flip] ^= 16
                self._flips = [flip - len(data) for flip in self._flips if flip >= len(data)]
            if self._cut_after is None:
                return data
            left, self._cut_after = self._cut_after, max(0, self._cut_after - len(data))
            if left >= len(data):
                return data
            self._cut_after = None
        self._cut()
        return data[:left]


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with open_store() as store:
        control = store.control
        assert isinstance(control, LocalControl)
        listener = listen_tcp("127.0.0.1", 0)
        port = listener.getsockname()[1]
        with Server(control.tiers, [listener], tenants=Tenants({}, {}, os.getuid())):
            made = Proxy(port)
            yield made
            made.close()


@pytest.fixture(scope="module")
def store(proxy: Proxy) -> Iterator[kvstore.Store]:
    with kvstore.connect(proxy.address, NAMESPACE, timeout=2.0) as connected:
        yield connected


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "load", "lease", "match"]),
        st.integers(1, 4),
        st.integers(1, 6),
    ),
    min_size=1,
    max_size=6,
)
# Small numbers cut heads, large ones payload.
PLACES = st.one_of(st.integers(0, 200), st.integers(0, 400_000))


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=STEPS, cut_after=st.none() | PLACES, flips=st.lists(PLACES, max_size=3))
def test_what_arrives_is_exact_or_a_miss(
    proxy: Proxy,
    store: kvstore.Store,
    steps: list[tuple[str, int, int]],
    cut_after: int | None,
    flips: list[int],
) -> None:
    proxy.harm(cut_after, flips)
    for step, seed, count in steps:
        hashes = chain(seed, count)
        if step == "put":
            result = put(store, hashes)
            assert result.num_blocks <= count
        elif step == "load":
            load(store, hashes)  # compares every byte that counts
        elif step == "match":
            store.match(hashes)
        else:
            with store.acquire(hashes) as lease:
                assert len(lease) <= count
    proxy.harm(None, [])
    last = chain(9, 3)
    deadline = time.monotonic() + WAIT_S
    while put(store, last).num_blocks != 3 or load(store, last) != 3:
        assert time.monotonic() < deadline, "did not recover"
