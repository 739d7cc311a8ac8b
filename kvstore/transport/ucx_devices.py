"""Which network devices UCX shall use: the RDMA ports of this machine, or the interface that has
the address on which an endpoint listens."""

from __future__ import annotations

import fcntl
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from kvstore.address import is_loopback
from kvstore.errors import ConfigError

_SIOCGIFADDR = 0x8915
_INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True, slots=True)
class RdmaPort:
    """A port that is up. `interface`: the network interface on top of it; "" where none is."""

    device: str
    port: int
    interface: str

    @property
    def name(self) -> str:
        """As UCX calls it."""
        return f"{self.device}:{self.port}"


def rdma_ports(root: Path = _INFINIBAND) -> list[RdmaPort]:
    """Return the RDMA ports of this machine that are up."""
    found = []
    for state in sorted(root.glob("*/ports/*/state")):
        if "ACTIVE" not in _read(state):
            continue
        device, port = state.parts[-4], int(state.parts[-2])
        found.append(RdmaPort(device, port, _read(state.parent / "gid_attrs" / "ndevs" / "0")))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # an entry that is not in use cannot be read
        return ""


def interface_of(host: str) -> str:
    """Return the interface whose first address is `host`; "" for all of them.

    UCX listens on the first address of an interface and on no other.

    Raises:
        ConfigError: none has it.
    """
    try:
        entry = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"listen: {host}: {error}") from error
    family, address = entry[0], str(entry[4][0])
    if address in ("0.0.0.0", "::"):
        return ""
    packed = socket.inet_pton(family, address.partition("%")[0])
    found = _interface_of_6(packed) if family == socket.AF_INET6 else _interface_of_4(packed)
    if found is None:
        raise ConfigError(f"listen: no network interface has {address} as its first address")
    return found


def _interface_of_4(packed: bytes) -> str | None:
    if packed[0] == 127:
        packed = bytes((127, 0, 0, 1))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asked, _SIOCGIFADDR, request)
            except OSError:  # it has none
                continue
            if answer[20:24] == packed:
                return name
    return None


def _interface_of_6(packed: bytes) -> str | None:
    for line in _read(Path("/proc/net/if_inet6")).splitlines():
        address, *_, name = line.split()
        if bytes.fromhex(address) == packed:
            return name
    return None


@dataclass(frozen=True, slots=True)
class UcxDevices:
    """What UCX is told. `net_devices`: "" for all of them."""

    tls: str
    net_devices: str
    has_rdma: bool


def choose(
    listen: str, tls: str, net_devices: str, has_verbs: bool, ports: list[RdmaPort]
) -> UcxDevices:
    """Choose transports and devices: RDMA where the library and the machine have it, else TCP on
    the interface that has the address `listen`. Never shared memory: UCX takes two network
    namespaces, and containers, for one host.

    Args:
        listen: host, or "host:port".
        tls: UCX's transports, which win; "" for a choice.
        net_devices: UCX's devices, which win; "" for a choice.
        has_verbs: whether the library can use RDMA ports.
        ports: those of the machine.

    Raises:
        ConfigError: no interface has the address.
    """
    host = (listen.rpartition(":")[0] if ":" in listen else listen).strip("[]") or listen
    if tls or net_devices:
        chosen = tls or "ib,tcp"
        wants_rdma = any(part not in ("tcp", "self", "sm") for part in chosen.split(","))
        is_rdma = has_verbs and wants_rdma and bool(_named(ports, net_devices))
        return UcxDevices(tls or ("ib" if is_rdma else "tcp"), net_devices, is_rdma)
    interface = interface_of(host)
    if has_verbs and not is_loopback(host):
        usable = [port for port in ports if interface in ("", port.interface)]
        if usable:
            return UcxDevices("ib", ",".join(port.name for port in usable), True)
    return UcxDevices("tcp", interface, False)


def _named(ports: list[RdmaPort], net_devices: str) -> list[RdmaPort]:
    names = net_devices.split(",") if net_devices not in ("", "all") else None
    return [p for p in ports if names is None or p.name in names or p.device in names]
