"""Serves the tiers of this process to other processes.

The native server (csrc/net) answers what is asked often, on threads of its own and without the GIL.
It hands over as *tasks* what needs Python: greetings, what waits for the ssd, and calls. One thread
here takes tasks. It never waits: what may, goes to a lane (a thread with a bounded queue), and what
waits for a future goes to `Waiting`. On the lanes of greetings and of calls nothing waits for a
disk, so that a slow one keeps no client out; commits that wait for room in a queue have lanes of
their own, and so has the check of everything.

A client is admitted once and may then join with more connections. When its last one closes, however
it died, the native server frees what it held and says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from kvstore import _native, wire
from kvstore.address import unix_path
from kvstore.block import Namespace
from kvstore.daemon.processes import process_start
from kvstore.daemon.requests import Administered, Client, Requests
from kvstore.daemon.sockets import address_of, listen_unix, unlink_socket
from kvstore.daemon.tenants import DEFAULT, Identity, Peer, Tenants
from kvstore.daemon.tls import TlsPort
from kvstore.daemon.waiting import Waiting
from kvstore.errors import (
    ConfigError,
    IncompatibleError,
    KVStoreError,
    PeerUnavailableError,
)
from kvstore.metrics import METRICS
from kvstore.tiers.background import BackgroundThread
from kvstore.tiers.local import LocalControl, Tiers

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 1024
TASKS_MAX = 4096
_LANE_TASKS_MAX = 1024
_LOOK_LANES = 2
_WAIT_LANES = 3
_CLOSE_SECONDS = 5.0
_DECLARED = frozenset(key for metric in METRICS for key in metric.stats_keys())
# What a peer needs to reach the arena: kvstore.transport.EndpointInfo, packed, and its region.
Offer = Callable[[], tuple[bytes, int]]
_NO_CLIENT = Client(0, b"", Identity("", is_own_user=False, may_administer=False), None, 0, -1)


class Server:
    """Listening sockets, the native server behind them, and who answers its tasks.

    Thread safety: `_lock` guards `_clients` and `_tokens`; `_tenants` belongs to the first look
    lane, on which all greetings are.
    """

    def __init__(
        self,
        tiers: Tiers,
        listeners: Sequence[socket.socket],
        *,
        tenants: Tenants | None = None,
        client_writes: str = "in_place",
        threads: int = 2,
        epoch: bytes = b"",
        administered: Administered | None = None,
        offer: Offer | None = None,
    ) -> None:
        """`listeners`: see `listen`. `offer`: how peers reach the arena."""
        self._tiers = tiers
        self._listeners: list[socket.socket] = []
        self._tls_ports: list[TlsPort] = []
        self.addresses: list[str] = []
        self._tenants = tenants or Tenants({}, {}, os.geteuid())
        self._may_write = client_writes == "in_place"
        self._offer = offer
        self.epoch = epoch or secrets.token_bytes(16)
        self._lock = threading.Lock()
        self._clients: dict[int, Client] = {}
        self._tokens: dict[bytes, int] = {}
        self._closing = False
        self._waiting = Waiting()
        self._native = _native.NativeServer(tiers.core, threads, CONNECTIONS_MAX, TASKS_MAX)
        self._requests = Requests(tiers, self._waiting, self._reply, self.stats, administered)
        self._look_lanes = _lanes("kvstore-look", _LOOK_LANES)
        self._wait_lanes = _lanes("kvstore-wait", _WAIT_LANES)
        self._check_lane = BackgroundThread("kvstore-check", _LANE_TASKS_MAX)
        self._thread = threading.Thread(target=self._run, name="kvstore-tasks", daemon=True)
        tiers.outside.append(self._counted)
        self._thread.start()
        for listener in listeners:
            self.listen(listener)

    def listen(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Take over a listening socket, and answer whoever connects or has connected there, in the
        clear or by TLS. It is closed, and one of a path removed, by `close`."""
        if tls is not None:
            port = TlsPort(listener, tls, self._native.serve)
            self._tls_ports.append(port)
            self.addresses.append(port.address)
            port.start()
            return
        self._listeners.append(listener)
        self.addresses.append(address_of(listener))
        self._native.listen(listener.fileno(), listener.family == socket.AF_UNIX)

    @property
    def address(self) -> str:
        return self.addresses[0]

    @property
    def native(self) -> _native.NativeServer:
        return self._native

    @property
    def num_clients(self) -> int:
        with self._lock:
            return len(self._clients)

    def has_client(self, number: int) -> bool:
        with self._lock:
            return number in self._clients

    def stats(self) -> dict[str, Any]:
        """Return the metrics of the tiers, what clients did included."""
        return self._tiers.stats()

    def _counted(self) -> dict[str, int]:
        """What the native server counted, under the names of kvstore/metrics.py."""
        found = {}
        for key, value in self._native.stats().items():
            counter = f"kvstore_{key}_total"
            found[counter if counter in _DECLARED else f"kvstore_{key}"] = value
        return {name: value for name, value in found.items() if name in _DECLARED}

    def drain(self, timeout: float) -> bool:
        """Reserve nothing any more, and wait for writes under way."""
        return bool(self._native.drain(timeout))

    def close(self) -> None:
        """Disconnect everybody, release what they held, remove the sockets. Safe to call twice."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        for address in self.addresses:
            unlink_socket(address)
        for listener in self._listeners:
            listener.close()
        with contextlib.suppress(ValueError):
            self._tiers.outside.remove(self._counted)
        self._native.stop()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for port in self._tls_ports:
            port.close(deadline - time.monotonic())
        self._thread.join(_CLOSE_SECONDS)
        for lane in (*self._look_lanes, *self._wait_lanes, self._check_lane):
            lane.shutdown(deadline - time.monotonic())
        with self._lock:
            clients = list(self._clients.values())
            self._clients.clear()
            self._tokens.clear()
        for client in clients:
            if client.control is not None:
                client.control.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- tasks

    def _reply(self, task: Any, body: bytes, status: int) -> bool:
        return bool(self._native.reply(task.id, body, status))

    def _run(self) -> None:
        while not self._closing:
            task = self._native.next_task(self._waiting.seconds_left())
            self._waiting.expire()
            if task is None:
                continue
            try:
                self._take(task)
            except Exception:
                # Without this thread nobody is answered any more.
                self._tiers.counters.add("background_errors")
                log.exception("a task of kind %d failed", task.kind)

    def _take(self, task: Any) -> None:
        """Answer a task, or hand it to a lane. Does not wait."""
        kind, requests = task.kind, self._requests
        if kind == wire.Op.GONE:
            self._leave(task.client)
        elif kind >= wire.Op.NOTICE_STORED:
            requests.notice(task)
        elif kind in (wire.Op.HELLO, wire.Op.AUTH):
            # All on one lane: the handshakes under way are its own.
            greet = self._greet if kind == wire.Op.HELLO else self._prove
            self._hand_over(self._look_lanes[0], task, lambda: greet(task))
        else:
            client = self._client(task.client)
            if kind == wire.Op.ACQUIRE:
                requests.guarded(task, lambda: requests.acquire(task, client))
            elif kind == wire.Op.QUIESCED:
                requests.guarded(task, lambda: requests.quiesced(task, client))
            elif kind == wire.Op.CALL:
                lane = self._lane_of_call(task)
                self._hand_over(lane, task, lambda: requests.call(task, client))
            elif kind in (wire.Op.COMMIT, wire.Op.WRITE):
                lane = self._wait_lanes[task.client % _WAIT_LANES]
                self._hand_over(lane, task, lambda: requests.commit(task, client))
            else:
                requests.guarded(task, lambda: _no_such(kind))

    def _lane_of_call(self, task: Any) -> BackgroundThread:
        try:
            is_check = isinstance(wire.decode_call(task.body), wire.AdminVerify)
        except IncompatibleError:
            is_check = False  # refused there
        return self._check_lane if is_check else self._look_lanes[-1]

    def _hand_over(
        self, lane: BackgroundThread, task: Any, step: Callable[[], bytes | None]
    ) -> None:
        try:
            queued = lane.submit(self._requests.guarded, task, step)
        except RuntimeError:  # closing
            return
        if queued is None:
            error = PeerUnavailableError("the daemon has more to do than it can; try again")
            self._reply(task, str(error).encode(), wire.status_of(error))

    def _client(self, number: int) -> Client:
        with self._lock:
            return self._clients.get(number, _NO_CLIENT)

    # --- greetings

    def _greet(self, task: Any) -> bytes:
        hello = wire.decode_hello(task.body)
        if hello.version != wire.VERSION:
            raise IncompatibleError(
                f"the daemon speaks protocol {wire.VERSION}, the client {hello.version}"
            )
        peer = Peer(task.is_local, task.peer_uid)
        identity = self._tenants.identify(peer, hello.tenant, hello.peer)
        if identity is None:
            return wire.encode(self._tenants.challenge(task.connection, hello, task.body))
        return self._admit(task, hello, identity)

    def _prove(self, task: Any) -> bytes:
        proof = wire.decode_auth(task.body).proof
        hello, identity = self._tenants.settle(task.connection, proof)
        return self._admit(task, hello, identity)

    def _admit(self, task: Any, hello: wire.Hello, identity: Identity) -> bytes:
        namespace = _namespace_of(hello)
        if hello.token:
            client = self._join(task, hello.token, identity, namespace)
        else:
            client = self._add(task, identity, namespace)
        config, tiers = self._tiers.config, self._tiers
        may_map, may_write = self._rights(task, identity)
        welcome = wire.Welcome(
            token=client.token,
            client=client.number,
            epoch=self.epoch,
            arena_id=tiers.core.arena_id,
            arena_bytes=len(tiers.arena),
            block_bytes=namespace.spec.block_bytes if namespace else 0,
            may_map=may_map,
            may_map_writable=may_write,
            verify_always=config.verify == "always",
            threads=config.threads,
            lease_seconds=config.lease_seconds,
        )
        if identity.is_peer and self._offer is not None:
            welcome.endpoint, welcome.region = self._offer()
        return wire.encode(welcome)

    def _rights(self, task: Any, identity: Identity) -> tuple[bool, bool]:
        """Whether a client may map the arena, and whether writable."""
        is_own = identity.is_own_user and not identity.is_peer
        may_map = task.is_local and is_own and identity.tenant == DEFAULT
        # Of a process that we cannot see (another pid namespace), nobody could tell after a crash
        # whether it still copies into its slots.
        return may_map, may_map and self._may_write and process_start(task.peer_pid) != 0

    def _join(
        self, task: Any, token: bytes, identity: Identity, namespace: Namespace | None
    ) -> Client:
        with self._lock:
            client = self._clients.get(self._tokens.get(token, 0))
        if (
            client is None
            or client.identity != identity
            or client.uid != task.peer_uid
            or _digest(client.control.namespace if client.control else None) != _digest(namespace)
            or not self._native.join_client(task.connection, client.number)
        ):
            raise IncompatibleError("token: no such client; connect anew")
        return client

    def _add(self, task: Any, identity: Identity, namespace: Namespace | None) -> Client:
        number = secrets.randbits(63) | 1
        may_map, may_write = self._rights(task, identity)
        tiers = self._tiers
        start = process_start(task.peer_pid) if may_write else 0
        owner = tiers.core.new_owner(*((number, task.peer_pid, start) if may_write else ()))
        control = None
        try:
            if namespace is not None:
                tenant = tiers.tenant(identity.tenant)
                if identity.is_peer and not tiers.knows(namespace, tenant):
                    raise ConfigError("namespace: there are no blocks of it here")
                control = LocalControl(
                    tiers, namespace, owns_tiers=False, tenant=tenant, owner=owner
                )
            name = namespace.model if namespace else "admin"
            client = Client(
                number, secrets.token_bytes(16), identity, control, owner, task.peer_uid
            )
            with self._lock:
                if self._closing:
                    raise PeerUnavailableError("the daemon is closing")
                self._clients[number] = client
                self._tokens[client.token] = number
            if not self._native.add_client(
                task.connection,
                number,
                owner,
                control.namespace_id if control else -1,
                may_map=may_map,
                may_map_writable=may_write,
                notices=tiers.ssd is not None,
                notice_used=tiers.wants_used,
                may_read=not (identity.is_peer and tiers.config.peer_require_rdma),
                may_write=not identity.is_peer,
                label=_label(identity, name),
                block_tokens=control.namespace.spec.block_tokens if control else 0,
            ):
                raise PeerUnavailableError("the connection is gone")
        except BaseException:
            self._leave(number)
            tiers.core.release_owner(owner)
            raise
        return client

    def _leave(self, number: int) -> None:
        with self._lock:
            client = self._clients.pop(number, None)
            if client is not None:
                self._tokens.pop(client.token, None)
        if client is not None and client.control is not None:
            client.control.close()  # the native server ends the owner


def _label(identity: Identity, name: str) -> str:
    label = f"{identity.tenant}/{name}" if identity.tenant else name
    return f"peer:{label}" if identity.is_peer else label


def _lanes(name: str, count: int) -> list[BackgroundThread]:
    return [BackgroundThread(f"{name}-{i}", _LANE_TASKS_MAX) for i in range(count)]


def _no_such(kind: int) -> bytes:
    raise IncompatibleError(f"no such request: {kind}")


def _namespace_of(hello: wire.Hello) -> Namespace | None:
    if not hello.namespace:
        return None
    try:
        return Namespace.from_description(hello.namespace)
    except KVStoreError as error:
        raise type(error)(f"namespace: {error}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise IncompatibleError(f"namespace: {error}") from error


def _digest(namespace: Namespace | None) -> bytes:
    return namespace.digest if namespace else b""


def share_tiers(tiers: Tiers, address: str) -> Server:
    """Serve tiers to processes of this host and user; see `kvstore.share`."""
    return Server(tiers, [listen_unix(unix_path(address))])
