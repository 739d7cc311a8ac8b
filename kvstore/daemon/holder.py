"""Keeps the arena's descriptor while no daemon runs, so that DRAM content outlives a kill -9.

A process of its own: `python -I -S holder.py SOCKET`, standard library only, nothing of kvstore
imported, so that no fault of the daemon is a fault of this. It holds one descriptor and the name of
its generation, and answers processes of its own user on SOCKET (SOCK_SEQPACKET, mode 0600), one
packet a request:

    put GENERATION SECONDS (+ descriptor)   -> ok        hold this instead of what is held
    get SECONDS                             -> ok GENERATION (+ descriptor), or: none
    drop                                    -> ok        hold nothing
    ping                                    -> ok PID

A daemon lives for as long as its connection is open. SECONDS is how long the descriptor is kept
without any connection; then, or at once when nothing is held, the process ends and with it the
memory. It is bounded: one descriptor, CONNECTIONS_MAX connections, packets of PACKET_BYTES_MAX.
"""

from __future__ import annotations

import array
import contextlib
import os
import selectors
import signal
import socket
import struct
import sys
import time

PACKET_BYTES_MAX = 256
CONNECTIONS_MAX = 16
FIRST_SECONDS = 30.0  # for whoever started us to connect
HOLD_SECONDS_MAX = 1e9
WAIT_SECONDS_MAX = 3600.0  # of one wait; some systems refuse very long ones


class Holder:
    """The loop. One thread; nothing in it waits but the selector."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._num_connections = 0
        self._held = -1  # the descriptor
        self._generation = ""
        self._hold_seconds = FIRST_SECONDS
        self._alone_since = time.monotonic()

    def run(self) -> None:
        """Serve until nobody was connected for as long as the descriptor is to be kept."""
        while True:
            left = None
            if self._num_connections == 0:
                left = self._alone_since + self._hold_seconds - time.monotonic()
                if left <= 0:
                    return
                left = min(left, WAIT_SECONDS_MAX)
            for key, _ in self._selector.select(left):
                peer = key.fileobj
                assert isinstance(peer, socket.socket)
                if peer is self._listener:
                    self._accept()
                elif not self._answer(peer):
                    self._leave(peer)

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError:
            time.sleep(0.05)  # out of descriptors: no busy loop until one is free
            return
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if (
            struct.unpack("3i", credentials)[1] != os.geteuid()
            or self._num_connections >= CONNECTIONS_MAX
        ):
            peer.close()
            return
        peer.setblocking(False)
        self._num_connections += 1
        self._selector.register(peer, selectors.EVENT_READ)

    def _leave(self, peer: socket.socket) -> None:
        self._selector.unregister(peer)
        peer.close()
        self._num_connections -= 1
        self._alone_since = time.monotonic()

    def _answer(self, peer: socket.socket) -> bool:
        """Answer one request; False when the connection is to be closed."""
        size = array.array("i").itemsize
        try:
            packet, control, _, _ = peer.recvmsg(PACKET_BYTES_MAX, socket.CMSG_SPACE(4 * size))
        except BlockingIOError:
            return True
        except OSError:
            return False
        fds = array.array("i")
        for level, kind, data in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % size])
        given = list(fds)
        try:
            return self._obey(peer, packet.decode("ascii").split(), given)
        except (OSError, ValueError):  # a peer that is gone, or no words of ours
            return False
        finally:
            for fd in given:
                os.close(fd)

    def _obey(self, peer: socket.socket, words: list[str], given: list[int]) -> bool:
        """Do what a request says. What is kept of `given` is taken out of it."""
        word, arguments = words[:1], words[1:]
        if word == ["put"] and len(arguments) == 2 and len(given) == 1:
            self._keep_for(arguments[1])
            self._replace(given.pop(), arguments[0])
            peer.send(b"ok")
        elif word == ["get"] and len(arguments) == 1:
            self._keep_for(arguments[0])
            self._give(peer)
        elif words == ["drop"]:
            self._replace(-1, "")
            peer.send(b"ok")
        elif words == ["ping"]:
            peer.send(b"ok %d" % os.getpid())
        else:
            return False
        return True

    def _keep_for(self, seconds: str) -> None:
        value = float(seconds)
        if not 0 <= value <= HOLD_SECONDS_MAX:
            raise ValueError(seconds)
        self._hold_seconds = value

    def _replace(self, fd: int, generation: str) -> None:
        if self._held >= 0:
            os.close(self._held)
        self._held, self._generation = fd, generation
        if fd < 0:
            self._hold_seconds = 0.0

    def _give(self, peer: socket.socket) -> None:
        if self._held < 0:
            self._hold_seconds = FIRST_SECONDS  # the same as newly started
            peer.send(b"none")
        else:
            socket.send_fds(peer, [b"ok " + self._generation.encode()], [self._held])


def listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(before)
    listener.listen(CONNECTIONS_MAX)
    listener.setblocking(False)
    return listener


def detach(listener: socket.socket) -> None:
    """Go on as a process of our own: no terminal, no parent, no descriptor but the listener."""
    os.setsid()
    listening, told = os.pipe()
    if os.fork():
        os.close(told)
        os.read(listening, 1)
        os._exit(0)  # tells who started us that the socket is there
    listener.listen(CONNECTIONS_MAX)  # again: those who connect see the pid of who listened last
    os.close(told)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    keep = listener.fileno()
    os.closerange(3, keep)
    os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX"))


def main() -> None:
    path = sys.argv[1]
    try:
        listener = listen(path)
    except OSError as error:
        sys.stderr.write(f"{path}: {error.strerror}\n")
        raise SystemExit(1) from None
    path = os.path.abspath(path)  # detach leaves this directory
    detach(listener)
    holder = Holder(listener)
    try:
        holder.run()
    finally:
        # Before the listener closes: whoever finds no socket here may bind a new one.
        with contextlib.suppress(OSError):
            os.unlink(path)


if __name__ == "__main__":
    main()
