"""UCX: one-sided reads and writes by RDMA, or messages over TCP where that was asked for.

libucp is loaded at run time (`ucx_library`); the rest is csrc/net/ucx_*. For those who use it:

- By RDMA a peer gets a region's key over its link only, after it proved that it knows the secret;
  the key is asked back when the region goes. `deregister` is True when all of them are back, or
  their holders gone: until then memory must stay mapped.
- Over TCP UCX would emulate one-sided moves in software: a target then dies of a peer that goes
  away in the middle, and follows any address. So bytes go by messages there, which we check.
- UCX over TCP belongs on a network that is trusted all the same: whoever reaches its port can ask
  UCX itself for this process's memory, without a key. It is used only when asked for by name.
- As long as a link is alive after a move, local memory is settled; else it is once `close` said so.
"""

from __future__ import annotations

import msgspec

from kvstore import _native
from kvstore._native import CancelFlag
from kvstore.errors import (
    ConfigError,
    DeadlineExceededError,
    IncompatibleError,
    PeerUnavailableError,
    StoreClosedError,
)
from kvstore.transport import ucx_devices, ucx_library
from kvstore.transport.settings import TransportSettings
from kvstore.transport.types import Batch, EndpointInfo, Region, RegionInfo, Statuses


class UcxInfo(msgspec.Struct, frozen=True, array_like=True):
    """What a mover says of itself: how its worker is reached, and for people, by what."""

    address: bytes
    version: str
    transports: list[tuple[str, str]]


class UcxMover:
    """See `kvstore.transport.mover.Mover`.

    Raises:
        IncompatibleError: no libucp that works, or no RDMA and not asked for by name.
        ConfigError: the library that is named is not there, or no interface has the address.
    """

    name = "ucx"

    def __init__(self, settings: TransportSettings, secret: bytes, epoch: int) -> None:
        library = ucx_library.find(settings.ucx_library)
        devices = ucx_devices.choose(
            settings.listen,
            settings.ucx_tls,
            settings.ucx_devices,
            library.has_verbs,
            ucx_devices.rdma_ports(),
        )
        if settings.movers is None and not devices.has_rdma:
            raise IncompatibleError("ucx: no RDMA here; our own TCP is as fast as UCX's")
        self.library = library
        self.has_rdma = devices.has_rdma
        try:
            self._context = _native.UcxContext(
                library.path,
                devices.tls,
                devices.net_devices,
                settings.timeout,
                secret,
                epoch,
                modules=library.allowed_modules,
                one_sided=devices.has_rdma,
            )
        except RuntimeError as error:
            raise IncompatibleError(f"ucx: {error}") from error
        except ValueError as error:
            raise ConfigError(f"ucx: {error}") from error
        address = self._context.address()
        info = UcxInfo(address, self._context.version, self._context.transports())
        self._info = msgspec.msgpack.encode(info)

    def info(self) -> bytes:
        return self._info

    def register(self, region: Region, fd: int, fd_offset: int) -> bytes | None:
        try:
            known = self._context.register(
                region.region_id, region.address, region.num_bytes, region.writable
            )
        except RuntimeError:  # memory that the device cannot pin
            return None
        if not known:
            raise ConfigError(f"region: {region.region_id} is registered already")
        return b""  # its key goes over links only

    def deregister(self, region: Region, timeout: float) -> bool:
        try:
            return self._context.deregister(region.region_id, timeout)
        except RuntimeError as error:
            raise StoreClosedError(str(error)) from error

    def connect(self, peer: EndpointInfo, timeout: float) -> UcxMoverLink:
        try:
            info = msgspec.msgpack.decode(peer.movers[self.name], type=UcxInfo)
        except (KeyError, msgspec.MsgspecError) as error:
            raise IncompatibleError(f"ucx: not a description of a peer: {error}") from error
        try:
            link = self._context.connect(info.address, peer.epoch, peer.secret, timeout)
        except (PermissionError, ValueError) as error:
            raise IncompatibleError(str(error)) from error
        except ConnectionError as error:
            raise PeerUnavailableError(str(error)) from error
        except TimeoutError as error:
            raise DeadlineExceededError(str(error)) from error
        except RuntimeError as error:
            raise StoreClosedError(str(error)) from error
        return UcxMoverLink(link, self._context.version)

    def close(self) -> None:
        self._context.close()


class UcxMoverLink:
    """See `kvstore.transport.mover.MoverLink`."""

    def __init__(self, link: _native.UcxLink, version: str) -> None:
        self._link = link
        self._version = version

    @property
    def is_alive(self) -> bool:
        return self._link.is_alive()

    @property
    def failure(self) -> str:
        """Why it is not alive; "" while it is."""
        return self._link.failure()

    @property
    def detail(self) -> str:
        return f"UCX {self._version} {self._link.transports()}".strip()

    def open(self, region: RegionInfo) -> None:
        """Nothing but a check: the first move asks the peer for the key."""
        if UcxMover.name not in region.keys:
            raise IncompatibleError(f"ucx: region {region.region_id} is not registered for it")
        if not self._link.is_alive():
            raise PeerUnavailableError(f"ucx: {self._link.failure()}")

    def read(
        self, region_id: int, batch: Batch, timeout: float, cancel: CancelFlag | None
    ) -> Statuses:
        try:
            return self._link.read(
                region_id,
                batch.remote_offsets,
                batch.local_addresses,
                batch.lengths,
                batch.checksums,
                timeout,
                cancel,
            )
        except RuntimeError as error:
            raise StoreClosedError(str(error)) from error

    def write(
        self, region_id: int, batch: Batch, timeout: float, cancel: CancelFlag | None
    ) -> Statuses:
        try:
            return self._link.write(
                region_id,
                batch.remote_offsets,
                batch.local_addresses,
                batch.lengths,
                batch.checksums,
                timeout,
                cancel,
            )
        except RuntimeError as error:
            raise StoreClosedError(str(error)) from error

    def close(self, timeout: float) -> bool:
        return self._link.close(timeout)
