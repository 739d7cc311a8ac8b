"""Relay: carries bytes between a TLS connection and a socket pair of this process.

One thread for each, since an `ssl.SSLSocket` is not for two at a time. It holds at most two buffers
of bytes, and takes nothing more from one side before the other has taken those. When either side
ends, what it had said is still delivered, for some seconds at most; then both are closed.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable

_BUFFER_BYTES = 128 << 10
_RECORD_BYTES = 16 << 10  # at most in one TLS record, and a read brings one
_LINGER_SECONDS = 5.0  # for last words; whoever does not take them by then loses them
_PAIR_BYTES = 1 << 20
_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class _Flow:
    """Bytes on their way in one direction. `ended`: none will follow those here."""

    __slots__ = ("_end", "_start", "_view", "ended")

    def __init__(self) -> None:
        self._view = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._end = 0
        self.ended = False

    @property
    def is_empty(self) -> bool:
        return self._start == self._end

    def fill(self, receive: Callable[[memoryview], int], at_once: int) -> bool:
        """Take what is there; raises what `receive` does where that is nothing.

        Args:
            at_once: a `receive` that brings less has no more for now.

        Returns:
            Whether there may be more, which poll() need not know of.
        """
        while self._end < _BUFFER_BYTES:
            try:
                came = receive(self._view[self._end :])
            except _NOT_NOW:
                if self.is_empty:
                    raise
                return False
            self._end += came
            self.ended = came == 0
            if came < at_once:
                return self._end == _BUFFER_BYTES
        return True

    def drain(self, send: Callable[[memoryview], int]) -> None:
        """Hand over all; may raise what `send` raises, and goes on from there next time."""
        while self._start < self._end:
            self._start += send(self._view[self._start : self._end])
        self._start = self._end = 0


class Relay:
    """See above. `secure` is its own from now on.

    `failure`: what TLS found wrong, or the peer with us; "" where the connection just ended. Set
    before the other side sees the end.
    """

    def __init__(
        self, secure: ssl.SSLSocket, name: str, on_end: Callable[[Relay], None] | None = None
    ) -> None:
        self.failure = ""
        self._secure = secure
        self._plain, self._theirs = socket.socketpair()
        for end in (self._plain, self._theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PAIR_BYTES)
        self._on_end = on_end
        self._inward, self._outward = _Flow(), _Flow()
        self._thread = threading.Thread(target=self.run, name=name, daemon=True)
        _relays.add(self)

    def take_plain_end(self) -> int:
        """Return the descriptor of the end to speak to, which is the caller's from now on."""
        return self._theirs.detach()

    def start(self) -> None:
        self._thread.start()

    def run(self) -> None:
        """Carry until either side ends. By `start`, or on a thread of the caller's."""
        try:
            self._secure.setblocking(False)
            self._plain.setblocking(False)
            self._carry()
        except ssl.SSLEOFError:
            pass
        except ssl.SSLError as error:
            self.failure = error.reason or str(error)
        except OSError:
            pass
        finally:
            self.close()
            if self._on_end is not None:
                self._on_end(self)

    def close(self) -> None:
        """Close without last words. REQUIRES: the thread does not run."""
        for end in (self._secure, self._plain, self._theirs):
            end.close()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _carry(self) -> None:
        inward, outward = self._inward, self._outward
        until = float("inf")
        while True:
            wanted: dict[socket.socket, int] = {}
            more = self._move(
                inward, self._secure, self._secure.recv_into, self._plain, self._tell, wanted
            )
            more |= self._move(
                outward, self._plain, self._hear, self._secure, self._secure.send, wanted
            )
            if inward.ended or outward.ended:
                if inward.is_empty and outward.is_empty:
                    break
                until = min(until, time.monotonic() + _LINGER_SECONDS)
            poller = select.poll()
            for end, events in wanted.items():
                poller.register(end, events)
            left = until - time.monotonic()
            if left <= 0:
                break
            if not more:
                poller.poll(None if left == float("inf") else left * 1000)
        if outward.ended:
            self._say_goodbye()

    def _move(
        self,
        flow: _Flow,
        source: socket.socket,
        receive: Callable[[memoryview], int],
        target: socket.socket,
        send: Callable[[memoryview], int],
        wanted: dict[socket.socket, int],
    ) -> bool:
        """Move what can be moved now, and add to what to wait for. Return whether there may be more
        that nothing will wake us for."""
        more = False
        at_once = _RECORD_BYTES if source is self._secure else _BUFFER_BYTES
        end, event = source, select.POLLIN
        try:
            if flow.is_empty and not flow.ended:
                more = flow.fill(receive, at_once)
            end, event = target, select.POLLOUT
            flow.drain(send)
        except _NOT_NOW as error:
            if isinstance(error, ssl.SSLWantReadError):
                event = select.POLLIN
            elif isinstance(error, ssl.SSLWantWriteError):
                event = select.POLLOUT
            wanted[end] = wanted.get(end, 0) | event
            return False
        if not flow.ended:
            wanted[source] = wanted.get(source, 0) | select.POLLIN
        return more

    def _hear(self, into: memoryview) -> int:
        try:
            return self._plain.recv_into(into)
        except ConnectionError:  # closed, with some of what we told it not read
            return 0

    def _tell(self, said: memoryview) -> int:
        try:
            return self._plain.send(said)
        except ConnectionError:  # nobody is there to be told; `_hear` finds that out too
            return len(said)

    def _say_goodbye(self) -> None:
        """Announce the end, and wait for the peer's: closing sooner might cost it what we said."""
        with contextlib.suppress(OSError, ssl.SSLError):
            self._secure.unwrap()
        drain(self._secure, _LINGER_SECONDS)


def drain(connection: socket.socket, seconds: float) -> None:
    """End what we say, and wait until the peer has done so too; what comes is nobody's any more."""
    until = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)  # from now on a TLS connection is a plain one
        connection.setblocking(False)
        poller = select.poll()
        poller.register(connection, select.POLLIN)
        while poller.poll(max(0.0, until - time.monotonic()) * 1000):
            if not connection.recv(65536):
                return


_relays: weakref.WeakSet[Relay] = weakref.WeakSet()


def _forked() -> None:
    """In a child: it has no thread of ours, and must not keep the connections open."""
    for relay in list(_relays):
        relay.close()


os.register_at_fork(after_in_child=_forked)
