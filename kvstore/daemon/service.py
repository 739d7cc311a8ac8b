"""kvstored: the tiers of a host, served until told to stop.

    start:   lock the state directory -> listen -> take the arena back from the holder, or make one
             -> restore ssd and arena -> hand the arena to the holder -> answer -> upkeep -> HTTP
    stop:    refuse new writes, wait for those under way -> stop listening -> write out what is
             queued -> drop the arena, or leave it to the holder

One process at a time has a state directory. SIGTERM and SIGINT stop and free everything; a second
one ends the process at once. SIGHUP starts the program again in the same process, with the arena
kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import select
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kvstore import _native, tracing
from kvstore.address import tcp_address
from kvstore.auth import private_directory, read_secret
from kvstore.certificates import TlsFiles
from kvstore.config import DaemonConfig, parse_bytes
from kvstore.config_sources import fallback_directory, notify_socket
from kvstore.daemon import report
from kvstore.daemon.holding import Holding
from kvstore.daemon.logs import RecentErrors
from kvstore.daemon.notify import notify
from kvstore.daemon.server import Server
from kvstore.daemon.sockets import (
    address_of,
    listen_tcp,
    listen_unix,
    unlink_socket,
)
from kvstore.daemon.tenants import tenants_of
from kvstore.daemon.upkeep import Scrubber, Upkeep, sweep_quarantine
from kvstore.errors import ConfigError, IncompatibleError, InUseError, StorageError
from kvstore.records import records_from
from kvstore.tiers.local import Tiers
from kvstore.tiers.names import Tenant

if TYPE_CHECKING:
    from kvstore.peers import Peers

log = logging.getLogger(__name__)

Adoption = Literal["auto", "must", "never"]
State = Literal["adopting", "serving", "draining"]
Ending = Literal["stop", "keep", "restart"]

DRAIN_SECONDS = 5.0
_DRAIN_SLICE_SECONDS = 0.1
_WRITE_OUT_SECONDS = 60.0
_KEPT_SECONDS = 5.0
_ANSWER_SECONDS = 0.5  # for whoever asked us to end to take the answer and leave
RESTART_HOLD_SECONDS = 60.0  # at least: how long the arena waits for the program to start again
_BLOCK_BYTES = 64 << 10  # small for a block of a real model: bounds that follow from it are wide
_CLIENTS_SHOWN_MAX = 1000
_LOOK_SECONDS = 60.0  # nothing depends on it


class Service:
    """One daemon. Make it, then `run` it, or use it as a context manager.

    Raises:
        ConfigError: a setting is wrong; with adopt="must", there is nothing that fits.
        InUseError: another daemon has the state directory, the ssd directory or the address.
        OutOfSpaceError, StorageError, IncompatibleError: see `kvstore.open`.
    """

    def __init__(
        self,
        config: DaemonConfig,
        *,
        adopt: Adoption = "auto",
        environment_token: bytes | None = None,
        signals: bool = False,
    ) -> None:
        """`signals`: heed those of `run` from now on: one that comes during the start ends it as
        soon as it runs. Only on the main thread."""
        self.config = config
        self.epoch = secrets.token_bytes(16)
        self.state: State = "adopting"
        self._started = time.monotonic()
        self._adopted: dict[str, float] | None = None
        self._ending: Ending | None = None  # how this run ends, once that is known
        self._num_stops = 0  # signals to stop that came
        self._asked_by = 0  # the client that wants it; it has yet to get its answer
        # What a signal handler may use: no lock, which its own thread might hold.
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._errors = RecentErrors()
        logging.getLogger().addHandler(self._errors)
        self._signals = ExitStack()  # gives signals back to whose they were
        self._undo = ExitStack()  # what start did, taken back by stop in reverse
        self._undo.callback(os.close, self._wake)
        self._undo.callback(logging.getLogger().removeHandler, self._errors)
        try:
            if signals:
                self._take_signals()
            self._start(adopt, environment_token)
        except BaseException:
            self._signals.close()
            self._undo.close()
            raise

    # --- start

    def _start(self, adopt: Adoption, environment_token: bytes | None) -> None:
        config, undo = self.config, self._undo
        if config.trace:
            undo.callback(tracing.export_to(config.trace).close)
        tenants = tenants_of(config, environment_token, os.geteuid())
        directory, beside = Path(config.state), config.socket_path.parent
        if not beside.exists() or beside == fallback_directory():
            private_directory(beside, "listen")
        private_directory(directory, "state")
        undo.callback(os.close, _lock(directory))
        # Before the arena is there: who comes meanwhile is answered the moment we can, and does
        # not have to find out by asking again.
        mode = 0o666 if tenants.has_other_users else 0o600
        listeners = [self._listening(listen_unix(config.socket_path, mode))]
        if config.tcp:
            listeners.append(self._listening(listen_tcp(*tcp_address(config.tcp))))
        tls = _tls(config)
        self._holding = Holding(directory, config.hold_seconds)
        undo.callback(self._holding.close, 2.0)
        self._tiers = self._open_tiers(adopt)
        undo.callback(self._close_tiers)
        self._keep_arena()
        self._scrubber = Scrubber(self._tiers.core, self._tiers.counters)
        self._peers = self._start_peers()
        self._history = report.History(self._tiers.stats())
        self._server = Server(
            self._tiers,
            [],
            tenants=tenants,
            client_writes=config.client_writes,
            threads=config.io_threads,
            epoch=self.epoch,
            administered=self,
            offer=self._peers.offer if self._peers else None,
        )
        undo.callback(self._server.close)
        # Whoever is answered may ask for our status, so all that it shows is there by now.
        self.addresses = [address_of(listener, is_tls=tls is not None) for listener in listeners]
        self.state = "serving"
        for listener in listeners:
            is_unix = listener.family == socket.AF_UNIX
            self._server.listen(listener, None if is_unix else tls)
        each_second: list[Callable[[], object]] = [
            self._holding.check,
            self._tiers.core.expire_leases,
            self._sweep,
            self._look,
        ]
        upkeep = Upkeep(
            self._scrubber, config.scrub_bytes_per_second, each_second, self._tiers.counters
        )
        undo.callback(upkeep.close)
        if config.http:
            self._start_http(environment_token)

    def _start_peers(self) -> Peers | None:
        config = self.config
        if not config.peer_token:
            return None
        # Here: a daemon without peers has no time to load what they need.
        from kvstore.peers import Peers

        secret = read_secret(config.peer_token, "peer_token")
        peers = Peers(
            self._tiers,
            secret,
            epoch=self.epoch,
            listen=config.peer_host,
            tls=_files(config).client_context() if config.tls_cert else None,
        )
        self._tiers.fetches = peers  # which closes it
        return peers

    def _listening(self, listener: socket.socket) -> socket.socket:
        def close() -> None:
            if listener.fileno() >= 0:  # the server did not come to own it
                unlink_socket(address_of(listener))
                listener.close()

        self._undo.callback(close)
        return listener

    def _close_tiers(self) -> None:
        # What is in an arena that is kept need not be on ssd: it is written when there is time.
        self._tiers.close(_WRITE_OUT_SECONDS if self._ending == "stop" else _KEPT_SECONDS)

    def _start_http(self, environment_token: bytes | None) -> None:
        from kvstore.daemon.http import start_http

        config = self.config
        secret = read_secret(config.token_file) if config.token_file else environment_token
        http = start_http(self, config.http, secret)
        self._undo.callback(http.close)
        self.addresses.append(f"http://{http.address}/")

    def _open_tiers(self, adopt: Adoption) -> Tiers:
        if adopt == "never":
            self._holding.drop()
        else:
            found = self._adopt(must=adopt == "must")
            if found is not None:
                return found
        return self._tiers_on(None)

    def _adopt(self, *, must: bool) -> Tiers | None:
        """Return tiers on the arena that the holder has; None where there is none that fits."""
        began = time.monotonic()
        held = self._holding.get()
        if held is None:
            if must:
                raise ConfigError(f"adopt: no holder in {self.config.state} has an arena")
            return None
        fd, generation = held
        try:
            made_as = generation.partition(".")[2]
            if made_as != self._made_as():
                raise IncompatibleError(
                    f"arena: it was made with {made_as or 'other settings'}, "
                    f"the configuration says {self._made_as()}"
                )
            try:
                core = _native.StoreCore.adopt(fd, self.config.eviction)
            except ValueError as error:
                raise IncompatibleError(f"arena: {error}") from error
            tiers = self._tiers_on(core)
        except IncompatibleError as error:
            if must or not str(error).startswith("arena:"):
                raise
            log.warning("the arena that was kept is dropped: %s", error)
            self._holding.drop()
            return None
        finally:
            os.close(fd)
        self._adopted = {**(tiers.recovered or {}), "seconds": time.monotonic() - began}
        tracing.note("adopt", **self._adopted)
        log.info("adopted an arena: %s", self._adopted)
        return tiers

    def _tiers_on(self, core: _native.StoreCore | None) -> Tiers:
        tenants = [
            Tenant(name, tenant.cpu_quota_bytes, tenant.ssd_quota_bytes)
            for name, tenant in self.config.tenants.items()
        ]
        return Tiers(self.config, self._block_bytes(), core=core, tenants=tenants)

    def _block_bytes(self) -> int:
        """What to prepare for before the first client says what its blocks are."""
        chunk = parse_bytes(self.config.chunk)
        return min(_BLOCK_BYTES, max(4096, chunk - 4096)) if chunk else _BLOCK_BYTES

    def _made_as(self) -> str:
        """What of the configuration an arena is made for; a word."""
        config = self.config
        huge = "-huge" if config.huge_pages else ""
        return f"{config.cpu_bytes}-{config.chunk_bytes(self._block_bytes())}{huge}"

    def _keep_arena(self, hold_seconds: float | None = None) -> None:
        """Give the arena to the holder, unless it is not to outlive us."""
        seconds = self.config.hold_seconds if hold_seconds is None else hold_seconds
        if seconds > 0:
            core = self._tiers.core
            generation = f"{core.arena_id.hex()}.{self._made_as()}"
            self._holding.put(core.arena_fd, generation, seconds)

    @property
    def holder_pid(self) -> int:
        """The process that keeps the arena; 0 when there is none."""
        return self._holding.pid

    # --- run and stop

    def run(self) -> None:
        """Serve until a signal or an administrator ends it. Only on the main thread."""
        with self._signals:
            self._take_signals()
            notify(notify_socket(), "READY=1")
            while self._ending is None:
                select.select([self._wake], [], [], _LOOK_SECONDS)
            if self._ending == "restart":
                notify(notify_socket(), "RELOADING=1")
                self.stop()
                if self._ending == "restart":
                    _start_again()
                with contextlib.suppress(InUseError, StorageError):
                    self._drop()  # told to stop after it had been kept
            notify(notify_socket(), "STOPPING=1")
            self.stop()

    def _take_signals(self) -> None:
        taken = {
            signal.SIGTERM: self._on_stop,
            signal.SIGINT: self._on_stop,
            signal.SIGHUP: lambda _number, _frame: self._decide("restart"),
        }
        for number, act in taken.items():
            self._signals.callback(signal.signal, number, signal.signal(number, act))

    def _on_stop(self, _number: int, _frame: FrameType | None) -> None:
        self._num_stops += 1
        if self._num_stops > 1:
            try:
                if self._ending != "keep":
                    self._drop()
            finally:
                os._exit(1)
        if self._ending == "restart":
            self._ending = "stop"
        self._decide("stop")

    def _drop(self) -> None:
        # What a connection of its own says cannot wait for a lock of this process.
        Holding(Path(self.config.state), 0.0).drop()

    def _decide(self, ending: Ending) -> None:
        if self._ending is None:
            self._ending = ending
            os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Finish what is under way and end; keeps the arena where it was decided so."""
        if self.state == "draining":
            return
        self.state = "draining"
        self._ending = self._ending or "stop"
        try:
            self._finish()
        finally:
            self._undo.close()

    def _finish(self) -> None:
        """Wait for what is under way, and say what is to become of the arena."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        while self._server.has_client(self._asked_by) and time.monotonic() < deadline:
            time.sleep(0.002)
        if not self._drain(DRAIN_SECONDS):
            log.warning("writes were still under way after %g s", DRAIN_SECONDS)
        try:
            if self._ending == "stop":
                self._holding.drop()
            else:
                least = RESTART_HOLD_SECONDS if self._ending == "restart" else 0.0
                self._keep_arena(max(self.config.hold_seconds, least))
        except (InUseError, StorageError) as error:
            # We end all the same, and start again where that was asked for, if need be empty.
            log.error("the holder does not do as it is told: %s", error)

    def _drain(self, seconds: float) -> bool:
        """In slices: between them a second signal is heard."""
        deadline = time.monotonic() + seconds
        while not self._server.drain(_DRAIN_SLICE_SECONDS):
            if time.monotonic() >= deadline:
                return False
        return True

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- what administrators ask (kvstore.daemon.requests.Administered)

    def restart(self, asked_by: int) -> dict[str, Any]:
        self._asked_by = asked_by
        self._decide("restart")
        return {"epoch": self.epoch.hex(), "pid": os.getpid()}

    def shutdown(self, keep: bool, asked_by: int) -> dict[str, Any]:
        self._asked_by = asked_by
        self._decide("keep" if keep else "stop")
        return {"epoch": self.epoch.hex(), "pid": os.getpid()}

    def verify(self, seconds: float) -> dict[str, Any]:
        checked_bytes, removed, whole = self._scrubber.everything(seconds)
        return {"checked_bytes": checked_bytes, "removed_blocks": removed, "whole": whole}

    def namespaces(self) -> list[dict[str, Any]]:
        core = self._tiers.core
        return [
            {
                "number": number,
                "tenant": tenant,
                "model": namespace.model,
                "block_bytes": core.block_bytes(number),
                "digest": namespace.digest.hex(),
                "description": namespace.describe(),
            }
            for number, tenant, namespace in self._tiers.described()
        ]

    def inspect(self, namespace: int, hashes: bytes) -> dict[str, Any]:
        rows = {row["number"]: row for row in self.namespaces()}
        if namespace not in rows:
            raise ConfigError(f"namespace: there is no number {namespace}")
        if len(hashes) % 32:
            raise ConfigError(f"hashes: {len(hashes)} bytes are no hashes")
        array = np.frombuffer(hashes, np.uint8).reshape(-1, 32)
        core = self._tiers.core
        return {
            "namespace": rows[namespace],
            "residency": core.residency(namespace, array).tolist(),
            "blocks": [_block(row) for row in records_from(core.describe(namespace, array))],
        }

    # --- what is shown (kvstore.daemon.exposition.Served)

    @property
    def latency_bounds(self) -> Sequence[float]:
        return _native.LATENCY_BOUNDS

    def latencies(self) -> Mapping[str, tuple[list[int], float]]:
        return self._server.native.latencies()

    def status(self) -> dict[str, Any]:
        core, native = self._tiers.core, self._server.native
        values = self._metrics()
        counts = core.stats()
        return {
            "version": _version(),
            "epoch": self.epoch.hex(),
            "pid": os.getpid(),
            "uptime_seconds": time.monotonic() - self._started,
            "state": self.state,
            "addresses": self.addresses,
            "adopted": self._adopted,
            "tiers": report.tiers_of(values),
            "metrics": values,
            "rates": self._history.rates(values),
            "history": self._history.rows(),
            "hot_prefixes": [
                {"namespace": number, "first_block": first.hex(), "uses": uses, "blocks": blocks}
                for number, first, uses, blocks in native.hot_prefixes()
            ],
            "tenants": [self._tenant("")] + [self._tenant(name) for name in self.config.tenants],
            "namespaces": self.namespaces(),
            "clients": [_shown(client) for client in native.clients()[:_CLIENTS_SHOWN_MAX]],
            "leases": counts["leases"],
            "reservations": counts.get("reservations", 0),
            "quarantined_slots": sum(slots for *_, slots in core.quarantine()),
            "peers": self._peers.describe() if self._peers else None,
            "recent_errors": self._errors.list(),
        }

    def _metrics(self) -> dict[str, Any]:
        values = self._tiers.stats()
        scrubber = self._scrubber
        values["kvstore_scrub_checked_bytes_total"] = scrubber.checked_bytes
        values["kvstore_scrub_rounds_total"] = scrubber.rounds
        if self._adopted is not None:
            values["kvstore_adopted_blocks"] = self._adopted.get("adopted", 0)
        return values

    def _tenant(self, name: str) -> dict[str, Any]:
        found = self._tiers.core.tenant_stats(self._tiers.tenant(name))
        quotas = self.config.tenants.get(name)
        return {
            "name": name,
            "cpu_used_bytes": found["cpu_used_bytes"],
            "cpu_quota_bytes": quotas.cpu_quota_bytes if quotas else 0,
            "ssd_used_bytes": found["ssd_used_bytes"],
            "ssd_quota_bytes": quotas.ssd_quota_bytes if quotas else 0,
            "blocks": found["cpu_blocks"],
        }

    def _look(self) -> None:
        if self._history.is_due():
            self._history.add(self._metrics())

    def _sweep(self) -> None:
        freed = sweep_quarantine(self._tiers.core)
        if freed:
            log.info("%d slots of writers that died are free again", freed)


def _lock(directory: Path) -> int:
    """Return a descriptor that holds the directory's lock until it is closed."""
    path = directory / "lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StorageError(error.errno or 0, f"state: {path}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 20, 0).decode(errors="replace").strip()
        os.close(fd)
        raise InUseError(
            f"state: {directory} belongs to another daemon, process {holder}"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _start_again() -> None:
    """Become the program anew: the same command line, less what would drop the arena."""
    arguments = [word for word in sys.orig_argv[1:] if word != "--fresh"]
    # Asked for once more before the new program can take note, it would end it.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *arguments])


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("kvstore-llm")
    except metadata.PackageNotFoundError:
        return "source"


def _block(row: np.void) -> dict[str, Any]:
    return {
        "hash": row["hash"].tobytes().hex(),
        "depth": int(row["depth"]),
        "segment": int(row["segment"]),
        "stored_bytes": int(row["stored_bytes"]),
        "codec": int(row["codec"]),
        "checksum": int(row["checksum"]),
    }


def _shown(client: Mapping[str, Any]) -> dict[str, Any]:
    address = client.get("address") or ("unix" if client["uid"] >= 0 else "tcp")
    return {**client, "address": address}


def _tls(config: DaemonConfig) -> ssl.SSLContext | None:
    """Return what `tcp` encrypts by; None: it does not."""
    if not config.tls_cert:
        return None
    return _files(config).server_context()


def _files(config: DaemonConfig) -> TlsFiles:
    return TlsFiles(config.tls_ca, config.tls_cert, config.tls_key)
