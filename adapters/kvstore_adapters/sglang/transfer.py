"""KVStoreTransfer: what moves KV from SGLang's prefill servers to its decode servers.

It has the methods of SGLang's MooncakeTransferEngine, in the place of which the plug-in puts it.
SGLang keeps what Mooncake's connector decides: a decode server registers its pools here and tells
the prefill server its session id and the addresses of the pages that a request shall have; the
prefill server writes them, then a small record of its own, and says that it is done. A piece that
did not arrive as it was sent is never said to have: checksums are verified where it arrives.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvstore import ConfigError, IncompatibleError, KVStoreError
from kvstore.address import is_loopback
from kvstore.auth import read_secret, user_secret
from kvstore.config_sources import Setting, transfer_variables
from kvstore.gpu.device import Device
from kvstore.transport import Endpoint, Region, Status, TransportSettings
from kvstore_adapters.compat import check_release
from kvstore_adapters.sglang.address_map import Addresses, AddressMap
from kvstore_adapters.sglang.sessions import ERRORS, Session, Statuses, summary
from kvstore_adapters.sglang.staging import Staging

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_PEER_SILENT_SECONDS = 2.0  # after which a peer that gives no sign is given up
_PROBE_SECONDS = 2.0
_DEREGISTER_SECONDS = 5.0
_SECRET_NAME = "sglang-transfer"


@dataclass(frozen=True)
class TransferSettings:
    """From the environment: SGLang has no flag to pass them by.

    token_file: the secret that prefill and decode servers share. Without one only servers of one
        user on one host reach each other.
    timeout: seconds that a batch may take. SGLang gives the pages of a request that was aborted to
        another one after 30 s, so it must be less.
    movers: which may be used, in this order; none: the best that works.
    """

    token_file: str = ""
    timeout: float = 20.0
    movers: tuple[str, ...] | None = None

    @classmethod
    def of(cls, found: dict[str, Setting]) -> TransferSettings:
        """
        Raises:
            ConfigError: a value is wrong; the message names the variable.
        """
        settings = cls(token_file=found["token_file"].value) if "token_file" in found else cls()
        timeout, movers = settings.timeout, settings.movers
        if "timeout" in found:
            timeout = _seconds(*found["timeout"])
        if "movers" in found:
            movers = tuple(name.strip() for name in found["movers"].value.split(","))
        return cls(settings.token_file, timeout, movers)


def _seconds(text: str, origin: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise ConfigError(f"{origin}: {text!r} is not a number of seconds") from None
    if not 0.1 <= seconds <= 29:
        raise ConfigError(f"{origin}: {text} is not between 0.1 and 29 seconds")
    return seconds


class Pool(NamedTuple):
    """Memory that SGLang registered. `region`: as which others reach it; None: they do not."""

    region_id: int  # of no use
    address: int
    num_bytes: int
    is_host: bool
    region: Region | None


class KVStoreTransfer:
    """Thread safety: all methods may be called from any thread.

    Args:
        hostname: where SGLang thinks that peers reach this host.
        gpu_id: which GPU's memory is sent from, where it is a GPU's.
        ib_device: SGLang's; not used.
        settings: default: from the environment.

    Raises:
        KVStoreError: a setting is wrong, or nothing can listen.
    """

    def __init__(
        self,
        hostname: str,
        gpu_id: int | None = None,
        ib_device: str | None = None,
        *,
        settings: TransferSettings | None = None,
    ) -> None:
        check_release("sglang")
        self._settings = settings or TransferSettings.of(transfer_variables())
        if self._settings.token_file:
            self._secret = read_secret(self._settings.token_file, "KVSTORE_TRANSFER_TOKEN_FILE")
            host, known_by = hostname, self._settings.token_file
        else:
            self._secret, path = user_secret(_SECRET_NAME)
            host, known_by = LOOPBACK, str(path)
        self._endpoint = Endpoint(_transport(host, self._settings), secret=self._secret)
        address = self._endpoint.tcp_address
        if address is None:
            self._endpoint.close()
            raise ConfigError("KVSTORE_TRANSFER_MOVERS: it needs tcp, by which servers meet")
        self.hostname = host
        self._session_id = address
        self._gpu_id = gpu_id or 0
        self._lock = threading.Lock()
        self._pools: dict[int, Pool] = {}
        self._map = AddressMap(())  # of our own memory
        self._device_map = AddressMap(())
        self._staging: Staging | None = None
        self._sessions: dict[str, Session] = {}
        log.info(
            "KV is handed over by kvstore: session %s, movers %s, secret of %s",
            address,
            ", ".join(self._endpoint.movers),
            known_by,
        )
        if not self._settings.token_file and not is_loopback(hostname):
            log.warning(
                "no KVSTORE_TRANSFER_TOKEN_FILE: only servers of this user on this host can hand"
                " over KV to this one, and it listens on %s, not on %s",
                LOOPBACK,
                hostname,
            )

    # --- what SGLang calls

    def get_session_id(self) -> str:
        return self._session_id

    def get_ib_device(self) -> str:
        """No device has this name, so that nothing which wants to share a device with Mooncake's
        engine takes this for one."""
        return "kvstore"

    def register(self, ptr: int, length: int) -> None:
        self.batch_register([ptr], [length])

    def deregister(self, ptr: int) -> None:
        if self.batch_deregister([ptr]) != 0:
            raise RuntimeError(f"memory at {ptr:#x} is still being read or written")

    def batch_register(self, ptrs: Sequence[int], lengths: Sequence[int]) -> int:
        """Take memory for a hand-off: to send from in a prefill server, to be written to by others
        elsewhere. Raises where it cannot be, since SGLang does not look at what is returned.

        Raises:
            IncompatibleError: it is device memory, which others cannot write to.
            KVStoreError: it is none at all, or the GPU refuses.
        """
        is_prefill = _is_prefill()
        host = _HostMemory()
        with self._lock:
            for ptr, length in zip(ptrs, lengths, strict=True):
                known = self._pools.get(ptr)
                if known is not None and known.num_bytes == length:
                    continue
                if known is not None:
                    self._deregister(ptr)
                self._pools[ptr] = self._pool(ptr, length, is_prefill, host.has(ptr, length))
            self._make_maps()
        return 0

    def batch_deregister(self, ptrs: Sequence[int]) -> int:
        """0: nobody reads or writes that memory any more; -1: somebody may."""
        with self._lock:
            settled = [self._deregister(ptr) for ptr in ptrs]
            self._make_maps()
        return 0 if all(settled) else -1

    def drain(self) -> bool:
        """End what others are writing into our memory. True: nothing of what was sent before can
        come any more. Who still sends by right tries again, and finds the memory anew."""
        with self._lock:
            for ptr, pool in list(self._pools.items()):
                if pool.region is None:
                    continue
                if not self._endpoint.deregister(pool.region, _DEREGISTER_SECONDS):
                    return False
                region = self._endpoint.register((ptr, pool.num_bytes), writable=True)
                self._pools[ptr] = pool._replace(region=region)
        return True

    def transfer_sync(
        self, session_id: str, buffer: int, peer_buffer_address: int, length: int
    ) -> int:
        return self.batch_transfer_sync(session_id, [buffer], [peer_buffer_address], [length])

    def batch_transfer_sync(
        self,
        session_id: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
    ) -> int:
        """Write pieces to the memory of a session. 0: all of them arrived as they are here, by the
        deadline; -1: not so, and the log says why."""
        began = time.monotonic()
        try:
            reason = self._write(session_id, buffers, peer_buffer_addresses, lengths, began)
        except ERRORS as error:
            reason = str(error)
        except Exception:  # SGLang's thread would die of it, and with it the server's PD
            log.exception("hand-off to %s", session_id)
            return -1
        seconds = time.monotonic() - began
        if reason:
            log.warning("hand-off to %s failed after %.3f s: %s", session_id, seconds, reason)
            self._forget(session_id)
            return -1
        log.debug("%d bytes to %s in %.6f s", sum(lengths), session_id, seconds)
        return 0

    def send_probe(self, peer_session_id: str) -> int:
        """0: the session is there and takes what we send."""
        try:
            self._session(peer_session_id).probe(_PROBE_SECONDS)
        except (KVStoreError, OSError) as error:
            log.info("probe of %s: %s", peer_session_id, error)
            self._forget(peer_session_id)
            return -1
        return 0

    # ---

    def close(self) -> None:
        with self._lock:
            sessions, self._sessions = list(self._sessions.values()), {}
        for session in sessions:
            session.close()
        self._endpoint.close()
        if self._staging is not None:
            self._staging.close()

    def _write(
        self,
        session_id: str,
        buffers: Sequence[int],
        peer_addresses: Sequence[int],
        lengths: Sequence[int],
        began: float,
    ) -> str:
        """Return why it failed, "" for not at all."""
        ours, theirs, sizes = (
            np.array(values, np.uint64) for values in (buffers, peer_addresses, lengths)
        )
        if not len(ours) == len(theirs) == len(sizes):
            return f"{len(ours)} buffers, {len(theirs)} peer addresses, {len(sizes)} lengths"
        if not len(ours):
            return ""
        in_host = self._map.find(ours, sizes) >= 0
        in_device = self._device_map.find(ours, sizes) >= 0
        unknown = np.flatnonzero(~(in_host | in_device))
        if len(unknown):  # what is not there would kill us
            row = unknown[0]
            return f"{sizes[row]} bytes at {int(ours[row]):#x} here are not registered"
        deadline = began + self._settings.timeout
        session = self._session(session_id)

        def send(sources: Addresses, targets: Addresses, lengths: Addresses) -> Statuses:
            return session.write(sources, targets, lengths, deadline)

        statuses = np.full(len(ours), Status.OK, np.uint8)
        if in_host.any():
            statuses[in_host] = send(ours[in_host], theirs[in_host], sizes[in_host])
        if in_device.any() and self._staging is not None:
            pieces = ours[in_device], theirs[in_device], sizes[in_device]
            statuses[in_device] = self._staging.send(*pieces, send, deadline)
        bad = statuses[statuses != Status.OK]
        if not len(bad):
            return ""
        row = np.flatnonzero(statuses != Status.OK)[0]
        return f"{summary(bad)} of {len(ours)}, first {sizes[row]} bytes at {int(theirs[row]):#x}"

    def _session(self, session_id: str) -> Session:
        with self._lock:
            session = self._sessions.get(session_id)
            if session is None:
                session = Session(self._endpoint, session_id, self._secret, self._settings.movers)
                self._sessions[session_id] = session
            return session

    def _forget(self, session_id: str) -> None:
        """A server that starts again has another session id."""
        with self._lock:
            session = self._sessions.pop(session_id, None)
        if session is not None:
            session.close()

    def _pool(self, ptr: int, length: int, is_prefill: bool, is_host: bool) -> Pool:
        if is_prefill:
            if not is_host and self._staging is None:
                self._staging = Staging(_device(self._gpu_id))
            return Pool(0, ptr, length, is_host, None)  # nobody has to reach it
        if not is_host:
            raise IncompatibleError(
                f"{length} bytes at {ptr:#x} are not host memory, which other servers cannot write"
                " to: a decode server with its KV on a GPU needs"
                " --disaggregation-decode-host-receive-threshold 0"
            )
        return Pool(0, ptr, length, True, self._endpoint.register((ptr, length), writable=True))

    def _deregister(self, ptr: int) -> bool:
        pool = self._pools.get(ptr)
        if pool is None:
            return True
        if pool.region is not None and not self._endpoint.deregister(
            pool.region, _DEREGISTER_SECONDS
        ):
            return False
        del self._pools[ptr]
        return True

    def _make_maps(self) -> None:
        self._map = AddressMap(pool for pool in self._pools.values() if pool.is_host)
        self._device_map = AddressMap(pool for pool in self._pools.values() if not pool.is_host)


def _device(ordinal: int) -> Device:
    from kvstore.gpu.cuda_device import CudaDevice

    return CudaDevice(ordinal)


def _transport(host: str, settings: TransferSettings) -> TransportSettings:
    movers = settings.movers
    if movers is not None and "tcp" not in movers:
        movers = (*movers, "tcp")  # by which servers ask one another what they have
    return TransportSettings(listen=host, movers=movers, timeout=_PEER_SILENT_SECONDS)


def _is_prefill() -> bool:
    """Whether this process only sends: then nobody has to write to its memory. SGLang may change
    its mind, and registers anew then."""
    running = sys.modules.get("sglang.srt.runtime_context")
    try:
        return running is not None and running.get_disagg().disaggregation_mode == "prefill"
    except ValueError:  # not in a server
        return False


class _HostMemory:
    """What of this process's address space can be read and written. Device memory has addresses
    too, at which there is nothing for the CPU."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            where, rights = line.split(maxsplit=2)[:2]
            if not rights.startswith("rw"):
                continue
            begin, end = (int(side, 16) for side in where.split("-"))
            if self._ranges and self._ranges[-1][1] == begin:
                self._ranges[-1] = (self._ranges[-1][0], end)
            else:
                self._ranges.append((begin, end))

    def has(self, address: int, num_bytes: int) -> bool:
        return any(begin <= address and address + num_bytes <= end for begin, end in self._ranges)
