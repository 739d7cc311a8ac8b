"""What a mover is: one way of bringing bytes from one endpoint's memory into another's."""

from __future__ import annotations

from typing import Protocol

from kvstore._native import CancelFlag
from kvstore.transport.types import Batch, EndpointInfo, Region, RegionInfo, Statuses


class MoverLink(Protocol):
    """To one peer. Thread safety: all methods may be called from any thread."""

    @property
    def is_alive(self) -> bool:
        """False once it is known that the peer, or the way there, is gone for good."""

    @property
    def detail(self) -> str:
        """How bytes travel, for people: devices, transports, connections."""

    def open(self, region: RegionInfo) -> None:
        """Make a peer's region usable.

        Raises:
            PeerUnavailableError: the peer is gone.
            IncompatibleError: the region has no key of this mover.
        """

    def read(
        self, region_id: int, batch: Batch, timeout: float, cancel: CancelFlag | None
    ) -> Statuses:
        """Bring pieces here; ends by the timeout, at once when cancelled or the peer dies."""

    def write(
        self, region_id: int, batch: Batch, timeout: float, cancel: CancelFlag | None
    ) -> Statuses:
        """As `read`, the other way round."""

    def close(self, timeout: float) -> bool:
        """End it. True: settled, that is, nobody writes into local memory for a move any more."""


class Mover(Protocol):
    """Of one endpoint. Thread safety: all methods may be called from any thread."""

    @property
    def name(self) -> str: ...

    @property
    def has_rdma(self) -> bool: ...

    def info(self) -> bytes:
        """What goes into `EndpointInfo.movers`: how a peer reaches us."""

    def register(self, region: Region, fd: int, fd_offset: int) -> bytes | None:
        """Serve a region to peers.

        Args:
            region: stays mapped until `deregister` returned True, or the endpoint is closed.
            fd: of the file that it maps, -1 where there is none.
            fd_offset: where in the file it begins.

        Returns:
            Its key, for `RegionInfo.keys`; None where this mover cannot move it.
        """

    def deregister(self, region: Region, timeout: float) -> bool:
        """Serve it no more. True: no peer reads or writes it now, or ever will."""

    def connect(self, peer: EndpointInfo, timeout: float) -> MoverLink:
        """
        Raises:
            PeerUnavailableError, DeadlineExceededError: it is not there.
            IncompatibleError: it is of another version or epoch, or does not know our secret.
        """

    def close(self) -> None: ...
