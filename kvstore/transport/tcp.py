"""Framed TCP: works everywhere, and is the default between hosts. Native code moves the bytes.

Every connection proves its secret both ways and names the epoch it expects. Each piece with a
checksum is checked where it arrives. Nothing is encrypted: over networks that are not trusted, use
a tunnel.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Iterator

import msgspec

from kvstore._native import (
    BulkLink,
    BulkServer,
    CancelFlag,
    ProtocolError,
    Regions,
    RemoteError,
)
from kvstore.address import tcp_address
from kvstore.errors import (
    ConfigError,
    DeadlineExceededError,
    IncompatibleError,
    InUseError,
    PeerUnavailableError,
)
from kvstore.transport.settings import TransportSettings
from kvstore.transport.types import (
    Batch,
    EndpointInfo,
    Region,
    RegionInfo,
    Status,
    Statuses,
    all_of,
)

_BACKLOG = 128
_UNSPECIFIED = ("0.0.0.0", "::")


class _Info(msgspec.Struct, frozen=True, array_like=True):
    address: str  # "host:port"


def address_in(info: bytes) -> str:
    """Return where a peer listens, of what its mover says of itself.

    Raises:
        IncompatibleError: it says no such thing.
    """
    try:
        address = msgspec.msgpack.decode(info, type=_Info).address
        tcp_address(address)
    except (msgspec.MsgspecError, UnicodeDecodeError, ConfigError) as error:
        raise IncompatibleError(f"tcp: the peer names no address: {error}") from error
    return address


class TcpMover:
    """See `kvstore.transport.mover.Mover`. `address`: "host:port" where peers reach us.

    Raises:
        ConfigError: no such address here, or one that tells peers nothing.
        InUseError: the port is taken.
    """

    name = "tcp"
    has_rdma = False

    def __init__(self, settings: TransportSettings, secret: bytes, epoch: int) -> None:
        self._connections = settings.connections
        self._regions = Regions()
        self._server = BulkServer(
            self._regions, secret, epoch, bytes_per_second=settings.bytes_per_second
        )
        with _listen(settings.listen) as listener:
            host, port = listener.getsockname()[:2]
            self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            self._server.listen(listener.fileno())

    def info(self) -> bytes:
        return msgspec.msgpack.encode(_Info(self.address))

    def publish(self, info: bytes) -> None:
        """Tell it to those who know our address and secret."""
        self._server.set_info(info)

    def info_of(self, address: str, secret: bytes, timeout: float) -> bytes:
        """Return what the endpoint that listens at an address tells.

        Raises:
            PeerUnavailableError, DeadlineExceededError: it does not answer.
            IncompatibleError: it does not know the secret, or is no endpoint.
        """
        tcp_address(address)
        with _failures():
            link = BulkLink(address, secret, 0, timeout)
            try:
                return link.info(timeout)
            finally:
                link.close()

    def counters(self) -> dict[str, int]:
        """What was served so far."""
        return self._server.counters()

    def register(self, region: Region, fd: int, fd_offset: int) -> bytes | None:
        self._regions.add(region.region_id, region.address, region.num_bytes, region.writable)
        return b""

    def deregister(self, region: Region, timeout: float) -> bool:
        return self._regions.remove(region.region_id, timeout)

    def connect(self, peer: EndpointInfo, timeout: float) -> TcpLink:
        address = address_in(peer.movers[self.name])
        with _failures():
            link = BulkLink(address, peer.secret, peer.epoch, timeout, self._connections)
        return TcpLink(link, address)

    def close(self) -> None:
        self._server.stop()


class TcpLink:
    """See `kvstore.transport.mover.MoverLink`.

    When its connections broke, a later move tries once to reach the peer again; one that was
    started anew since is not taken for it.
    """

    def __init__(self, link: BulkLink, address: str) -> None:
        self._link = link
        self._regions: dict[int, RegionInfo] = {}
        self.detail = f"tcp to {address}"

    @property
    def is_alive(self) -> bool:
        return self._link.is_alive()

    def open(self, region: RegionInfo) -> None:
        self._regions[region.region_id] = region

    def read(
        self, region_id: int, batch: Batch, timeout: float, cancel: CancelFlag | None
    ) -> Statuses:
        return self._move(self._link.read, region_id, batch, timeout, cancel)

    def write(
        self, region_id: int, batch: Batch, timeout: float, cancel: CancelFlag | None
    ) -> Statuses:
        return self._move(self._link.write, region_id, batch, timeout, cancel)

    def _move(
        self,
        move: Callable[..., Statuses],
        region_id: int,
        batch: Batch,
        timeout: float,
        cancel: CancelFlag | None,
    ) -> Statuses:
        region = self._regions.get(region_id)
        if region is not None and not (inside := batch.is_inside(region.num_bytes)).all():
            # The peer would refuse them too, but a write would send them first.
            statuses = all_of(Status.REFUSED, len(batch))
            if inside.any():
                picked = batch.pick(inside)
                statuses[inside] = self._move(move, region_id, picked, timeout, cancel)
            return statuses
        return move(
            region_id,
            batch.remote_offsets,
            batch.local_addresses,
            batch.lengths,
            batch.checksums,
            timeout,
            cancel,
        )

    def close(self, timeout: float) -> bool:
        return self._link.close()


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise DeadlineExceededError(str(error)) from error
    except OSError as error:
        raise PeerUnavailableError(str(error)) from error
    except (RemoteError, ProtocolError) as error:
        raise IncompatibleError(str(error)) from error


def _listen(listen: str) -> socket.socket:
    """`listen`: as in TransportSettings."""
    has_port = listen.count(":") == 1 or "]:" in listen
    host, port = tcp_address(listen if has_port else f"[{listen.strip('[]')}]:0")
    if host in _UNSPECIFIED:
        raise ConfigError(f"listen: {host} tells peers no address: name one of this host")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InUseError(f"listen: {listen} is taken") from error
        raise ConfigError(f"listen: {listen}: {error.strerror or error}") from error
    return listener
