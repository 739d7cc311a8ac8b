"""Answers to the requests that the native server leaves to Python; see 0003-daemon.md.

None of these runs on the thread that takes tasks, but for `acquire` and the notices, which never
wait. What has to wait for a disk waits in `Waiting`; what may block runs on a lane of the server.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from kvstore import _native, wire
from kvstore.block import BlockHashes
from kvstore.control import ACK_LEVELS, Ack
from kvstore.daemon.tenants import Identity
from kvstore.daemon.waiting import Waiting
from kvstore.errors import ConfigError, IncompatibleError, KVStoreError, PeerUnavailableError
from kvstore.tiers.local import PROMISE_SECONDS, LocalControl, Tiers
from kvstore.transfer import TransferResult

log = logging.getLogger(__name__)

SECONDS_MAX = 3600.0
LEVEL_SECONDS_MAX = 60.0  # how long a commit waits for its level; then it has level "memory"
_ON_CPU = 1  # residency

Reply = Callable[[Any, bytes, int], bool]


@dataclass(frozen=True, slots=True)
class Client:
    """A client that was admitted."""

    number: int  # its writer id too
    token: bytes
    identity: Identity
    control: LocalControl | None  # None: it has no namespace
    owner: int
    uid: int


class Task(Protocol):
    """What is used of `_native.Task`."""

    @property
    def id(self) -> int: ...
    @property
    def kind(self) -> int: ...
    @property
    def connection(self) -> int: ...
    @property
    def client(self) -> int: ...
    @property
    def body(self) -> bytes: ...
    @property
    def namespace_id(self) -> int: ...
    @property
    def age_seconds(self) -> float: ...
    @property
    def peer_uid(self) -> int: ...
    @property
    def peer_pid(self) -> int: ...
    @property
    def is_local(self) -> bool: ...


class Administered(Protocol):
    """What administrators may ask of a daemon."""

    def status(self) -> dict[str, Any]: ...
    def namespaces(self) -> list[dict[str, Any]]: ...
    def inspect(self, namespace: int, hashes: bytes) -> dict[str, Any]: ...
    def verify(self, seconds: float) -> dict[str, Any]: ...
    def restart(self, asked_by: int) -> dict[str, Any]: ...
    def shutdown(self, keep: bool, asked_by: int) -> dict[str, Any]: ...


def bounded(seconds: float) -> float:
    return min(max(seconds, 0.0), SECONDS_MAX)


class Requests:
    """Thread-safe, as the tiers are."""

    def __init__(
        self,
        tiers: Tiers,
        waiting: Waiting,
        reply: Reply,
        stats: Callable[[], dict[str, Any]],
        administered: Administered | None,
    ) -> None:
        self._tiers = tiers
        self._core = tiers.core
        self._waiting = waiting
        self._reply = reply
        self._stats = stats
        self._administered = administered

    def guarded(self, task: Task, step: Callable[[], bytes | None]) -> None:
        """Reply with what `step` returns (None: it replies later), or with what it raises."""
        try:
            body = step()
        except CancelledError:
            self._reply(task, b"the daemon is closing", wire.status_of(PeerUnavailableError()))
        except (KVStoreError, ValueError, LookupError, TypeError) as error:
            self._reply(task, str(error).encode(), wire.status_of(error))
        except Exception as error:
            log.exception("a request of kind %d failed", task.kind)
            self._reply(task, f"{type(error).__name__}: {error}".encode(), 1)
        else:
            if body is not None:
                self._reply(task, body, 0)

    # --- notices: a dropped one costs at most a block that is not on ssd

    def notice(self, task: Task) -> None:
        hashes = wire.parse_chain(task.body)
        if task.kind == wire.Op.NOTICE_STORED:
            self._tiers.stored(task.namespace_id, hashes.array)
        elif task.kind == wire.Op.NOTICE_PREFETCH:
            self._tiers.prefetch(task.namespace_id, hashes)
        elif task.kind == wire.Op.NOTICE_USED:
            self._tiers.used(task.namespace_id, hashes.array)

    # --- acquire, when part of what is wanted is on ssd

    def acquire(self, task: Task, client: Client) -> None:
        request = wire.parse_acquire(task.body)
        control = _control_of(client)
        deadline = time.monotonic() - task.age_seconds + bounded(request.wait)
        number, hashes = control.namespace_id, request.hashes
        # Kept until all is there, so that reading the tail cannot push the head out.
        first = self._grant(client, number, request, use=False)
        in_cpu = len(first[1])
        available = hashes[: control.match(hashes)]
        finish_with = partial(
            self._finish_acquire, task, client, request, available, first[0], in_cpu
        )
        if self._tiers.is_stuck or len(available) <= in_cpu:
            finish_with("unavailable")
            return
        try:
            future = self._tiers.promote(number, available[in_cpu:])
        except BaseException:
            self._core.release(client.owner, first[0])
            raise

        def finish(is_done: bool) -> None:
            if not is_done:
                future.cancel()
                self._tiers.counters.add("deadline_exceeded")
            self.guarded(task, partial(finish_with, "" if is_done else "deadline"))

        self._waiting.add(future, deadline, finish)

    def _finish_acquire(
        self,
        task: Task,
        client: Client,
        request: wire.AcquireRequest,
        available: BlockHashes,
        first_lease: int,
        in_cpu: int,
        late: str,
    ) -> None:
        control = _control_of(client)
        wanted = request._replace(hashes=available)
        try:
            granted = self._grant(client, control.namespace_id, wanted, use=not request.is_pin)
        finally:
            if first_lease:
                self._core.release(client.owner, first_lease)
        lease, columns = granted[0], granted[1:]
        held = len(columns[0])
        if not request.is_pin:
            control.count_load(request.hashes, min(in_cpu, held), held, late)
        body = wire.pack_u64(lease, held) + b"".join(column.tobytes() for column in columns)
        if not self._reply(task, body, 0) and lease:
            # The client may be gone already, and what it held with it: nobody else ends this one.
            self._core.release(client.owner, lease)

    def _grant(
        self, client: Client, number: int, request: wire.AcquireRequest, *, use: bool
    ) -> tuple[Any, ...]:
        hashes = request.hashes.array
        return self._core.acquire(client.owner, number, hashes, request.ttl, use)

    # --- commit, at a level above memory

    def commit(self, task: Task, client: Client) -> bytes | None:
        request = wire.parse_commit(task.body)
        control = _control_of(client)
        if request.ack >= len(ACK_LEVELS):
            raise ConfigError(f"ack: there is no level {request.ack}")
        ack: Ack = ACK_LEVELS[request.ack]
        deadline = time.monotonic() - task.age_seconds + LEVEL_SECONDS_MAX
        # The native server has published what was reserved: here it is about the level only.
        # Who has been in line does not wait as long again, so a full queue holds up nobody in line
        # for longer than one promise may take.
        seconds = max(0.0, PROMISE_SECONDS - task.age_seconds)
        future = control.commit(0, request.checksums, request.hashes, ack, seconds)
        if future is None or (future.done() and not future.exception() and not _level(future)):
            self._tiers.stored(control.namespace_id, request.hashes.array)
            return wire.pack_u64(0)

        def finish(is_done: bool) -> None:
            self.guarded(task, lambda: wire.pack_u64(_level(future) if is_done else 0))

        self._waiting.add(future, deadline, finish)
        return None

    # --- the others

    def quiesced(self, task: Task, client: Client) -> bytes:
        writer = wire.parse_quiesced(task.body)
        if not client.identity.is_own_user:
            raise ConfigError("quiesced: only a client that maps the arena has writers")
        return wire.pack_u64(self._core.release_quarantine(writer))

    def call(self, task: Task, client: Client) -> bytes | None:
        request = wire.decode_call(task.body)
        if isinstance(request, wire.ADMIN_CALLS):
            if not client.identity.may_administer:
                raise PeerUnavailableError("only the daemon's own user may administer it")
            return wire.encode(self._administer(request, client.number))
        if isinstance(request, wire.Stats):
            return wire.encode(self._stats())
        control = _control_of(client)
        if client.identity.is_peer and not isinstance(request, wire.PEER_CALLS):
            raise PeerUnavailableError(f"a peer may read only: no {type(request).__name__.lower()}")
        if isinstance(request, wire.Prefetch):
            return self._prefetch(task, control, request)
        if isinstance(request, wire.Fetch):
            self._fetch(task, control, request)
            return None
        if isinstance(request, wire.Flush):
            self._flush(task, control, request)
            return None
        return wire.encode(self._ask(control, request))

    def _ask(self, control: LocalControl, request: wire.Call) -> Any:
        match request:
            case wire.Describe(chain=chain):
                return control.describe(wire.parse_chain(chain))
            case wire.Remove(chain=chain):
                return control.remove(wire.parse_chain(chain))
            case wire.Corrupt(block_hash=block_hash):
                return self._check(control, block_hash)
            case wire.Clear():
                return control.clear()
            case wire.Events():
                return control.packed_events()
        raise IncompatibleError(f"no such call: {type(request).__name__}")

    def _administer(self, request: wire.Call, asked_by: int) -> Any:
        daemon = self._administered
        if daemon is None:
            raise IncompatibleError("this is a store that a process shares, no daemon")
        match request:
            case wire.AdminStatus():
                return daemon.status()
            case wire.AdminNamespaces():
                return daemon.namespaces()
            case wire.AdminInspect(namespace=namespace, hashes=hashes):
                return daemon.inspect(namespace, hashes)
            case wire.AdminVerify(seconds=seconds):
                return daemon.verify(bounded(seconds))
            case wire.AdminRestart():
                return daemon.restart(asked_by)
            case wire.AdminShutdown(keep=keep):
                return daemon.shutdown(keep, asked_by)
        raise IncompatibleError(f"no such call: {type(request).__name__}")

    def _prefetch(self, task: Task, control: LocalControl, request: wire.Prefetch) -> bytes | None:
        hashes = wire.parse_chain(request.chain)
        deadline = time.monotonic() - task.age_seconds + bounded(request.timeout)
        future: Future[TransferResult] = control.prefetch(hashes)

        def finish(_: bool) -> None:
            self.guarded(task, lambda: wire.encode(_leading_in_cpu(control, hashes)))

        self._waiting.add(future, deadline, finish)
        return None

    def _fetch(self, task: Task, control: LocalControl, request: wire.Fetch) -> None:
        hashes = wire.parse_chain(request.chain)
        seconds = bounded(request.timeout) - task.age_seconds
        future = control.fetch_later(hashes, request.holders, seconds)

        def finish(is_done: bool) -> None:
            if not is_done:
                self._tiers.counters.add("deadline_exceeded")
            self.guarded(task, lambda: wire.encode(control.match(hashes)))

        self._waiting.add(future, time.monotonic() + seconds, finish)

    def _flush(self, task: Task, control: LocalControl, request: wire.Flush) -> None:
        deadline = time.monotonic() - task.age_seconds + bounded(request.timeout)
        future = control.flush_later()

        def finish(is_done: bool) -> None:
            if not is_done:
                future.cancel()
            self.guarded(task, lambda: wire.encode(is_done and future.result(0)))

        self._waiting.add(future, deadline, finish)

    def _check(self, control: LocalControl, block_hash: bytes) -> bool:
        """Look ourselves: a client that is wrong, or lies, must not cost others their blocks."""
        if len(block_hash) != 32:
            raise IncompatibleError(f"block_hash: {len(block_hash)} bytes are no hash")
        row = np.frombuffer(block_hash, np.uint8).reshape(1, 32)
        owner = self._core.new_owner()
        try:
            granted = self._core.acquire(owner, control.namespace_id, row, None, False)
            offsets, checksums = granted[1], granted[4]
            if not len(offsets):
                return False
            addresses = offsets + np.uint64(self._tiers.arena.ctypes.data)
            sums = np.empty(1, np.uint64)
            _native.checksum_blocks(addresses, control.namespace.spec.block_bytes, sums, 1)
            is_damaged = bool(sums[0] != checksums[0])
        finally:
            self._core.release_owner(owner)
        if is_damaged:
            control.report_corrupt(block_hash)
        return is_damaged


def _control_of(client: Client) -> LocalControl:
    if client.control is None:
        raise ConfigError("namespace: this client has none")
    return client.control


def _level(future: Future[Ack]) -> int:
    return ACK_LEVELS.index(future.result(0))


def _leading_in_cpu(control: LocalControl, hashes: BlockHashes) -> int:
    absent = np.flatnonzero(~(control.residency(hashes) & _ON_CPU).astype(bool))
    return int(absent[0]) if len(absent) else len(hashes)
