"""NixlLink: moves between our memory and that of one NIXL agent."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import ConfigError, StoreClosedError
from kvstore.transport import Batch, Status, checksums_of
from kvstore_adapters.nixl.describe import AgentInfo, Kind, MemoryRange

Statuses = npt.NDArray[np.uint8]
U64s = npt.NDArray[np.uint64]

_SPIN_SECONDS = 200e-6  # most moves end within; a sleep costs as much again
_NAP_SECONDS = 50e-6
_DISCONNECTED = "nixlRemoteDisconnectError"
# What NIXL says when no memory of that kind is registered there.
_REFUSED = ("nixlNotFoundError", "nixlInvalidParamError", "nixlMismatchError")


class Core:
    """NIXL's agent, shared by ours and its links; None once gone. `lock`: around its calls."""

    def __init__(self, agent: Any) -> None:
        self.agent: Any = agent
        self.lock = threading.Lock()


class NixlLink:
    """Thread safety: all methods may be called from any thread.

    NIXL tells how a whole move ended, and nothing of its pieces: when it fails, all of them have.

    A move that was given up goes on, and writes into local memory whenever the peer sends: NIXL
    can neither end it (what it calls released and disconnected was seen to write) nor tell that it
    will not. Such memory is free again once `close` of the link, or of its agent, returned True.
    """

    def __init__(
        self,
        core: Core,
        peer: AgentInfo,
        find_ours: Callable[[U64s, U64s], MemoryRange | None],
    ) -> None:
        self._core = core
        self._lock = core.lock
        self._find_ours = find_ours
        self.peer = peer
        self._given_up: list[Any] = []
        self._alive = True
        self._closed = False

    @property
    def is_alive(self) -> bool:
        """False once a move found the peer gone, or after `close`."""
        return self._alive and not self._closed

    @property
    def is_settled(self) -> bool:
        """Whether no move that was given up may still write into our memory."""
        return not self._given_up

    def read(
        self, index: int, batch: Batch, *, timeout: float = 2.0, notice: bytes = b""
    ) -> Statuses:
        """Bring pieces of the peer's range number `index` here; return a status for each.

        Args:
            batch: pieces; where they have checksums, they are verified on arrival.
            timeout: seconds after which it is given up.
            notice: what the peer's agent is told once they are here; empty: nothing.

        Raises:
            ConfigError: local memory is not registered with our agent, or no such range.
            StoreClosedError: the link is closed.
        """
        statuses = self._move("READ", index, batch, timeout, notice)
        if batch.checksums is not None:
            arrived = statuses == Status.OK
            picked = batch.pick(arrived)
            assert picked.checksums is not None
            same = checksums_of(picked.local_addresses, picked.lengths) == picked.checksums
            statuses[arrived] = np.where(same, Status.OK, Status.DAMAGED)
        return statuses

    def write(
        self, index: int, batch: Batch, *, timeout: float = 2.0, notice: bytes = b""
    ) -> Statuses:
        """As `read`, the other way round. Nobody verifies checksums there: tell the consumer."""
        return self._move("WRITE", index, batch, timeout, notice)

    def _move(
        self, operation: str, index: int, batch: Batch, timeout: float, notice: bytes
    ) -> Statuses:
        if self._closed:
            raise StoreClosedError("the link is closed")
        if not 0 <= index < len(self.peer.ranges):
            raise ConfigError(f"index: {index} is none of {len(self.peer.ranges)} ranges")
        remote = self.peer.ranges[index]
        statuses = np.full(len(batch), Status.REFUSED, np.uint8)
        inside = batch.is_inside(remote.num_bytes)
        if not inside.any():
            return statuses
        chosen = batch.pick(inside)
        ours = self._find_ours(chosen.local_addresses, chosen.lengths)
        if ours is None:
            raise ConfigError("local_addresses: not in one range that is registered with the agent")
        if chosen.checksums is not None and ours.kind != "DRAM":
            raise ConfigError("checksums: memory of a GPU is not verified here")
        local = _descriptors(chosen.local_addresses, chosen.lengths, ours.device)
        theirs = _descriptors(
            chosen.remote_offsets + np.uint64(remote.address), chosen.lengths, remote.device
        )
        statuses[inside] = self._ended(
            operation, (local, ours.kind), (theirs, remote.kind), timeout, notice
        )
        return statuses

    def _ended(
        self,
        operation: str,
        local: tuple[U64s, Kind],
        remote: tuple[U64s, Kind],
        timeout: float,
        notice: bytes,
    ) -> Status:
        if not self._alive:
            return Status.LOST
        begin = time.monotonic()
        try:
            with self._lock:
                agent = self._core.agent
                if agent is None:
                    return Status.LOST
                transfer = agent.initialize_xfer(
                    operation,
                    agent.get_xfer_descs(*local),
                    agent.get_xfer_descs(*remote),
                    self.peer.name,
                    notice,
                )
        except Exception as error:  # noqa: BLE001 (NIXL's errors have no common base)
            return self._failed(error)
        status = self._waited(transfer, begin, timeout)
        if status is Status.LATE:
            self._given_up.append(transfer)
        else:
            _release(transfer, self._lock)
        return status

    def _waited(self, transfer: Any, begin: float, timeout: float) -> Status:
        try:
            with self._lock:
                state = self._core.agent.transfer(transfer)
            while state == "PROC":
                waited = time.monotonic() - begin
                if waited >= timeout:
                    return Status.LATE
                if waited > _SPIN_SECONDS:
                    time.sleep(_NAP_SECONDS)
                state = self._state(transfer)
        except Exception as error:  # noqa: BLE001 (as above)
            return self._failed(error)
        if state == "DONE":
            return Status.OK
        self._alive = False
        return Status.LOST

    def _failed(self, error: Exception) -> Status:
        kind = type(error).__name__
        if kind in _REFUSED:
            return Status.REFUSED
        self._alive = self._alive and kind != _DISCONNECTED
        return Status.LOST

    def _state(self, transfer: Any) -> str:
        with self._lock:
            if self._core.agent is None:
                return "ERR"
            return str(self._core.agent.check_xfer_state(transfer))

    def _has_ended(self, transfer: Any) -> bool:
        try:
            return self._state(transfer) != "PROC"
        except Exception:  # noqa: BLE001 (an error is an end)
            return True

    def close(self, timeout: float = 5.0) -> bool:
        """End it. True: settled, that is, nothing writes into our memory for a move of ours.

        Waits for moves that were given up. False: some go on; ask again, or close the agent.
        """
        self._closed = True
        give_up = time.monotonic() + timeout
        while True:
            for transfer in [one for one in self._given_up if self._has_ended(one)]:
                self._given_up.remove(transfer)
                _release(transfer, self._lock)
            if not self._given_up:
                break
            if time.monotonic() > give_up:
                return False
            time.sleep(_NAP_SECONDS)
        self._disconnect()
        return True

    def _disconnect(self) -> None:
        with self._lock:
            was_alive, self._alive = self._alive, False
            if was_alive and self._core.agent is not None:
                with contextlib.suppress(Exception):  # the peer went first
                    self._core.agent.remove_remote_agent(self.peer.name)

    def abandon(self) -> None:
        """Let go of NIXL's objects: its agent is about to end, and with it all moves."""
        self._closed, self._alive = True, False
        given_up, self._given_up = self._given_up, []
        for transfer in given_up:
            _release(transfer, self._lock)


def _descriptors(addresses: U64s, lengths: U64s, device: int) -> U64s:
    rows = np.empty((len(addresses), 3), np.uint64)
    rows[:, 0], rows[:, 1], rows[:, 2] = addresses, lengths, device
    return rows


def _release(transfer: Any, lock: threading.Lock) -> None:
    """One that NIXL does not let go of yet, it does when its agent ends."""
    with lock, contextlib.suppress(Exception):
        transfer.release()
