"""Endpoint: a process's side of all transports. Link: from it to one peer, over one mover.

    with Endpoint() as ours:
        region = ours.register(SharedMemory(1 << 30))
        link = ours.connect(EndpointInfo.decode(received))
        statuses = link.read(7, Batch(addresses, offsets, 65536, checksums))

What an `EndpointInfo` says opens the endpoint's regions to whoever has it; how it gets to the peer
is the caller's affair: over a channel that proves who is at its other end.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import itertools
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from kvstore._native import CancelFlag
from kvstore.address import is_loopback
from kvstore.auth import check_secret
from kvstore.errors import (
    ConfigError,
    DeadlineExceededError,
    IncompatibleError,
    KVStoreError,
    PeerUnavailableError,
    StoreClosedError,
)
from kvstore.transport.choice import MOVERS, boot_id, check_movers, choices, pid_namespace
from kvstore.transport.memory import SharedMemory
from kvstore.transport.mover import Mover, MoverLink
from kvstore.transport.settings import TransportSettings
from kvstore.transport.shm import ShmMover
from kvstore.transport.types import (
    SECRET_BYTES,
    VERSION,
    Batch,
    EndpointInfo,
    Region,
    RegionInfo,
    Status,
    Statuses,
    all_of,
)

_CLOSE_SECONDS = 5.0
_THREADS = 4  # of one link, for moves in the background
_LATE = {
    "tcp": ("kvstore.transport.tcp", "TcpMover"),
    "ucx": ("kvstore.transport.ucx", "UcxMover"),
    "cuda": ("kvstore.transport.cuda_ipc", "CudaIpcMover"),
}
Memory = SharedMemory | npt.NDArray[np.uint8] | tuple[int, int]


class Endpoint:
    """Thread safety: all methods may be called from any thread, of the process that made it.

    Args:
        settings: see `TransportSettings`.
        secret: what peers must know; default: random. Needed to listen beyond loopback.

    Raises:
        ConfigError: a setting is wrong, or it would listen to strangers.
        InUseError: the port is taken.
        KVStoreError: a mover that was asked for by name cannot work here; the message says why.
    """

    def __init__(
        self, settings: TransportSettings | None = None, *, secret: bytes | None = None
    ) -> None:
        settings = settings or TransportSettings()
        host = settings.listen.rpartition(":")[0] if ":" in settings.listen else settings.listen
        if secret is None and not is_loopback(host):
            raise ConfigError(f"listen: {settings.listen} is reachable by others: give a secret")
        self._settings = settings
        self._secret = secrets.token_bytes(SECRET_BYTES) if secret is None else secret
        check_secret(self._secret, "secret")
        self._pid = os.getpid()
        # Never 0, which stands for any.
        self._epoch = secrets.randbits(63) | 1
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._regions: dict[int, tuple[Region, RegionInfo, object]] = {}
        self._closed = False
        self.unavailable: dict[str, str] = {}  # movers that do not work here, and why
        self._movers: dict[str, Mover] = {}
        try:
            self._start_movers()
        except BaseException:
            self.close()
            raise
        self._publish()

    def _start_movers(self) -> None:
        settings = self._settings
        for name in MOVERS if settings.movers is None else check_movers(settings.movers):
            try:
                self._movers[name] = _make(name, settings, self._secret, self._epoch)
            except (ModuleNotFoundError, KVStoreError) as error:
                if settings.movers is not None:
                    raise
                self.unavailable[name] = str(error)

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def secret(self) -> bytes:
        return self._secret

    @property
    def movers(self) -> tuple[str, ...]:
        return tuple(self._movers)

    @property
    def tcp_address(self) -> str | None:
        """ "host:port" where the tcp mover listens; None: there is none."""
        address: str | None = getattr(self._movers.get("tcp"), "address", None)
        return address

    # --- regions

    def register(
        self, memory: Memory, *, writable: bool = False, fd: int = -1, fd_offset: int = 0
    ) -> Region:
        """Serve memory to peers.

        Args:
            memory: SharedMemory; a contiguous array of bytes; or address and length, which the
                caller keeps mapped until `deregister` returned True or the endpoint is closed.
            writable: peers may write to it too.
            fd: the file that an address maps; without one no other process can map it.
            fd_offset: where in the file it begins.

        Raises:
            ConfigError: no such memory.
        """
        self._check_open()
        if isinstance(memory, SharedMemory):
            address, num_bytes, fd = memory.address, memory.num_bytes, memory.fd
        elif isinstance(memory, tuple):
            address, num_bytes = memory
        else:
            if not memory.flags.c_contiguous:
                raise ConfigError("memory: the array is not contiguous")
            address, num_bytes = memory.ctypes.data, memory.nbytes
        if address <= 0 or num_bytes <= 0 or address + num_bytes > 1 << 63:
            raise ConfigError(f"memory: {num_bytes} bytes at {address:#x} are none")
        region = Region(next(self._ids), address, num_bytes, writable)
        keys: dict[str, bytes] = {}
        for name, mover in self._movers.items():
            key = mover.register(region, fd, fd_offset)
            if key is not None:
                keys[name] = key
        info = RegionInfo(region.region_id, address, num_bytes, writable, keys)
        with self._lock:
            self._regions[region.region_id] = (region, info, memory)
        self._publish()
        return region

    def deregister(self, region: Region, timeout: float = _CLOSE_SECONDS) -> bool:
        """Serve it no more. True: no peer reads or writes it now, or ever will.

        After False the memory must stay as it is; ask again later, or close the endpoint.
        """
        with self._lock:
            found = self._regions.get(region.region_id)
        if found is None:
            return True
        results = [mover.deregister(region, timeout) for mover in self._movers.values()]
        if not all(results):
            return False
        with self._lock:
            self._regions.pop(region.region_id, None)
        self._publish()
        return True

    def mark(self, region: Region, stream: int) -> None:
        """Reads of a GPU region that peers begin from now on wait for what is on `stream` so far.

        Raises:
            ConfigError: it is no registered region of the cuda mover.
            GpuError: the GPU refused.
        """
        mark = getattr(self._movers.get("cuda"), "mark", None)
        if mark is None or not mark(region, stream):
            raise ConfigError(f"region: {region.region_id} is not registered with a cuda mover")

    def describe(self, region: Region) -> RegionInfo:
        """Return what a peer needs to `Link.add_region` it.

        Raises:
            ConfigError: it is not registered.
        """
        with self._lock:
            found = self._regions.get(region.region_id)
        if found is None:
            raise ConfigError(f"region: {region.region_id} is not registered")
        return found[1]

    def info(self) -> EndpointInfo:
        """Return what a peer needs to `connect`: with our secret in it."""
        self._check_open()
        with self._lock:
            regions = [info for _, info, _ in self._regions.values()]
        return EndpointInfo(
            VERSION,
            boot_id(),
            self._epoch,
            self._pid,
            pid_namespace(),
            any(mover.has_rdma for mover in self._movers.values()),
            {name: mover.info() for name, mover in self._movers.items()},
            regions,
            self._secret,
        )

    def _publish(self) -> None:
        """Give the tcp mover what it tells those who know only its address."""
        publish = getattr(self._movers.get("tcp"), "publish", None)
        if publish is not None:
            publish(self.info().encode())

    # --- peers

    def connect(
        self,
        peer: EndpointInfo,
        *,
        movers: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Link:
        """Connect by the best mover that works.

        Args:
            peer: who.
            movers: only these, in this order; also ucx without RDMA.
            timeout: seconds for each that is tried.

        Raises:
            PeerUnavailableError, DeadlineExceededError: it is not there by any of them.
            IncompatibleError: no mover serves both; the message says why not, for each.
        """
        self._check_open()
        seconds = self._settings.timeout if timeout is None else timeout
        reasons = []
        failure: KVStoreError | None = None
        for choice in choices(self.info(), peer, movers):
            if not choice.usable:
                reasons.append(f"{choice.mover}: {choice.reason}")
                continue
            link = None
            try:
                mover_link = self._movers[choice.mover].connect(peer, seconds)
                link = Link(choice.mover, choice.reason, peer, mover_link, self._settings.timeout)
                for region in peer.regions:
                    link.add_region(region)
            except (PeerUnavailableError, DeadlineExceededError, IncompatibleError) as error:
                if link is not None:
                    link.close()
                failure = error
                reasons.append(f"{choice.mover}: {error}")
                continue
            except BaseException:
                if link is not None:
                    link.close()
                raise
            return link
        said = "; ".join(reasons)
        if isinstance(failure, DeadlineExceededError):
            raise DeadlineExceededError(f"peer: {said}") from failure
        if isinstance(failure, PeerUnavailableError):
            raise PeerUnavailableError(f"peer: {said}") from failure
        raise IncompatibleError(f"peer: no mover serves both: {said}") from failure

    def connect_to(
        self,
        address: str,
        secret: bytes,
        *,
        movers: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> Link:
        """Connect to the endpoint whose tcp mover listens at "host:port", by the best mover.

        Raises: as `connect`; ConfigError: we have no tcp mover.
        """
        return self.connect(self.info_of(address, secret, timeout), movers=movers, timeout=timeout)

    def info_of(self, address: str, secret: bytes, timeout: float | None = None) -> EndpointInfo:
        """Ask whoever listens at "host:port" for its EndpointInfo.

        Raises:
            PeerUnavailableError, DeadlineExceededError: it does not answer.
            IncompatibleError: it does not know the secret, or is no endpoint.
            ConfigError: we have no tcp mover.
        """
        self._check_open()
        ask = getattr(self._movers.get("tcp"), "info_of", None)
        if ask is None:
            raise ConfigError("movers: an address needs the tcp mover")
        seconds = self._settings.timeout if timeout is None else timeout
        return EndpointInfo.decode(ask(address, secret, seconds))

    # ---

    def _check_open(self) -> None:
        if self._closed or os.getpid() != self._pid:
            raise StoreClosedError("the endpoint is closed, or another process's")

    def close(self) -> None:
        """End all movers. Links must be closed before."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        for mover in self._movers.values():
            mover.close()
        with self._lock:
            self._regions.clear()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _make(name: str, settings: TransportSettings, secret: bytes, epoch: int) -> Mover:
    if name == "shm":
        return ShmMover(epoch)
    # Imported late: they load native libraries, or need ones that are not there.
    module, kind = _LATE[name]
    made: Mover = getattr(importlib.import_module(module), kind)(settings, secret, epoch)
    return made


class Move:
    """A move under way in the background."""

    __slots__ = ("_cancel", "_count", "_future")

    def __init__(
        self, future: concurrent.futures.Future[Statuses], cancel: CancelFlag, count: int
    ) -> None:
        self._future = future
        self._cancel = cancel
        self._count = count

    def done(self) -> bool:
        return self._future.done()

    def wait(self, timeout: float | None = None) -> Statuses:
        """Return the statuses.

        Raises:
            DeadlineExceededError: not done in time; the move goes on.
        """
        try:
            return self._future.result(timeout)
        except concurrent.futures.CancelledError:  # the link was closed before it began
            return all_of(Status.CANCELLED, self._count)
        except concurrent.futures.TimeoutError:
            raise DeadlineExceededError(f"move not done after {timeout} s") from None

    def when_done(self, call: Callable[[], None]) -> None:
        """Call this when it is done, at once if it is: from any thread, and it must not block."""
        self._future.add_done_callback(lambda _: call())

    def cancel(self) -> None:
        """End it soon. Local memory is its own until `wait` returned and, where it is not settled
        then, until the link is closed."""
        self._cancel.set()


class Link:
    """To one peer, over one mover. Thread safety: all methods may be called from any thread.

    `mover` and `reason`: what was chosen, and why. A link that is not alive stays so; connect anew.
    """

    def __init__(
        self, mover: str, reason: str, peer: EndpointInfo, link: MoverLink, timeout: float
    ) -> None:
        self.mover = mover
        self.reason = reason
        self.peer = peer
        self._link = link
        self._timeout = timeout
        self._lock = threading.Lock()
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._closed = False

    @property
    def is_alive(self) -> bool:
        return not self._closed and self._link.is_alive

    @property
    def detail(self) -> str:
        return self._link.detail

    @property
    def settles_late(self) -> bool:
        """Whether a move that did not end well may still write until `close` returned True."""
        return self.mover in ("ucx", "cuda")

    def add_region(self, region: RegionInfo) -> None:
        """Make a region usable that the peer registered after its info was taken.

        Raises:
            PeerUnavailableError: the peer is gone.
            IncompatibleError: this mover cannot move it.
        """
        if self.mover not in region.keys:
            raise IncompatibleError(f"{self.mover}: region {region.region_id} is not for it")
        self._link.open(region)

    def read(
        self,
        region_id: int,
        batch: Batch,
        *,
        timeout: float | None = None,
        cancel: CancelFlag | None = None,
    ) -> Statuses:
        """Bring pieces of a peer's region here; return the status of each. Never raises for a peer
        that is gone, slow or wrong."""
        seconds = self._timeout if timeout is None else timeout
        return self._link.read(region_id, batch, seconds, cancel)

    def write(
        self,
        region_id: int,
        batch: Batch,
        *,
        timeout: float | None = None,
        cancel: CancelFlag | None = None,
    ) -> Statuses:
        """As `read`, the other way round."""
        seconds = self._timeout if timeout is None else timeout
        return self._link.write(region_id, batch, seconds, cancel)

    def submit_read(self, region_id: int, batch: Batch, *, timeout: float | None = None) -> Move:
        """As `read`, in the background."""
        return self._submit(self.read, region_id, batch, timeout)

    def submit_write(self, region_id: int, batch: Batch, *, timeout: float | None = None) -> Move:
        """As `write`, in the background."""
        return self._submit(self.write, region_id, batch, timeout)

    def _submit(
        self, method: Callable[..., Statuses], region_id: int, batch: Batch, timeout: float | None
    ) -> Move:
        cancel = CancelFlag()
        with self._lock:
            if self._closed:
                raise StoreClosedError("the link is closed")
            if self._pool is None:
                self._pool = concurrent.futures.ThreadPoolExecutor(_THREADS, f"link-{self.mover}")
            future = self._pool.submit(method, region_id, batch, timeout=timeout, cancel=cancel)
        return Move(future, cancel, len(batch))

    def close(self, timeout: float = _CLOSE_SECONDS) -> bool:
        """End it. True: settled, that is, nobody writes into our memory for it any more."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        return self._link.close(timeout)

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
