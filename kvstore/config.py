"""Settings: one frozen dataclass a component, checked once, passed down as arguments.

A setting comes from, lowest first: the default written here, a TOML file, `KVSTORE_*` variables,
keyword arguments or flags (see kvstore/config_sources.py). An unknown name or a bad value is a
`ConfigError` that names it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

from kvstore.address import is_loopback, tcp_address, unix_path
from kvstore.config_sources import Setting, build, collect, runtime_directory, setting
from kvstore.errors import ConfigError

Verify = Literal["boundary", "always"]
IoKind = Literal["auto", "uring", "threads"]
Admission = Literal["all", "reuse"]
ClientWrites = Literal["in_place", "copy"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[_letter] = _UNITS[_letter + "ib"] = 1024**_power
    _UNITS[_letter + "b"] = 1000**_power

_SIZES = (
    "cpu", "chunk", "ssd_capacity", "ssd_segment", "write_behind", "ssd_write_budget",
    "peer_bandwidth",
)  # fmt: skip
MOVERS = ("shm", "ucx", "tcp")  # ways between two daemons' memories, the best first


def parse_bytes(value: int | str, name: str = "size") -> int:
    """Return bytes: an int as it is, or text such as "8GiB", "512M" (= MiB), "1GB" (10^9).

    Raises:
        ConfigError: the text is not a size, or the size is negative; the message names `name`.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
        if match is None or match[2].lower() not in _UNITS:
            raise ConfigError(f"{name}: {value!r} is not a size such as 8GiB or 512M")
        size = int(Fraction(match[1]) * _UNITS[match[2].lower()])
    if size < 0:
        raise ConfigError(f"{name}: {value!r} is negative")
    if size >= 1 << 62:
        raise ConfigError(f"{name}: {str(value)[:40]} is too large")
    return size


def format_bytes(size: float) -> str:
    """Return a size for people: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _is_a(kind: type | tuple[type, ...], value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_choices(config: object, **kinds: Any) -> None:
    for name, kind in kinds.items():
        if getattr(config, name) not in get_args(kind):
            raise ConfigError(
                f"{name}: {getattr(config, name)!r} is not one of {', '.join(get_args(kind))}"
            )


@dataclass(frozen=True)
class StoreConfig:
    """An embedded store. Sizes are bytes or text such as "8GiB"; see `parse_bytes`."""

    cpu: int | str = setting("1GiB", "DRAM for blocks, taken at the start")
    chunk: int | str = setting(0, "unit in which block sizes share the arena; 0: chosen from `cpu`")
    huge_pages: bool = setting(False, "back the arena with reserved huge pages (vm.nr_hugepages)")
    eviction: str = setting("lru", "which blocks leave DRAM first: lru, lfu, s3fifo, mq")
    verify: Verify = setting(
        "boundary", "boundary: check what comes from disk or a socket; always: every read too"
    )
    threads: int = setting(2, "upper bound of threads that copy one batch")
    ssd: str = setting("", "directory of the ssd tier; default none")
    ssd_capacity: int | str = setting(
        "16GiB", "bound of its segment files; at least three segments"
    )
    ssd_segment: int | str = setting("256MiB", "size of a segment file")
    ssd_io: IoKind = setting("auto", "auto, uring or threads: how it is read and written")
    ssd_depth: int = setting(16, "disk requests in flight")
    codec: str = setting(
        "none", "how blocks are encoded on ssd: none, zstd, int8 (lossy), fp8 (lossy)"
    )
    write_behind: int | str = setting(
        "256MiB", "bytes that may wait for the ssd; over it, blocks are offered again later"
    )
    ssd_admission: Admission = setting(
        "all", "what is written to ssd: all that is put, or reuse: what is used again"
    )
    ssd_write_budget: int | str = setting(
        0, "bytes a second that may be written to ssd; 0: no bound"
    )
    lease_seconds: float = setting(60.0, "how long acquired blocks stay pinned unless released")
    peer_token: str = setting(
        "",
        "file (mode 0600) with the secret that daemons prove to one another; without it blocks are "
        "neither fetched from other daemons nor served to them",
    )
    movers: str = setting(
        "auto",
        "ways to other daemons' memory that may be used: shm, ucx, tcp, in any number, with commas "
        "between; auto: all there are",
    )
    peer_bandwidth: int | str = setting(
        0, "bytes a second that are fetched from other daemons; 0: no bound"
    )
    peer_require_rdma: bool = setting(
        False, "between hosts move blocks over RDMA only, never over TCP"
    )

    def __post_init__(self) -> None:
        for name in _SIZES:
            object.__setattr__(self, name, parse_bytes(getattr(self, name), name))
        _check_choices(self, verify=Verify, ssd_io=IoKind, ssd_admission=Admission)
        for name in ("threads", "ssd_depth"):
            value = getattr(self, name)
            if not _is_a(int, value) or not 1 <= value <= 1024:
                raise ConfigError(f"{name}: {value!r} is not an integer between 1 and 1024")
        if not _is_a((int, float), self.lease_seconds):
            raise ConfigError(f"lease_seconds: {self.lease_seconds!r} is not a number")
        if not self.lease_seconds > 0:
            raise ConfigError(f"lease_seconds: {self.lease_seconds!r} is not positive")
        self._check_peers()
        if self.cpu_bytes < 1 << 20:
            raise ConfigError(f"cpu: {self.cpu_bytes} bytes is less than 1 MiB")
        self._check_units()

    def _check_peers(self) -> None:
        for name in ("peer_token", "movers"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not text")
        if not self.mover_names or not set(self.mover_names) <= set(MOVERS):
            raise ConfigError(
                f"movers: {self.movers!r} is neither auto nor some of {', '.join(MOVERS)}"
            )
        if self.peer_require_rdma and not {"shm", "ucx"} & set(self.mover_names):
            raise ConfigError("peer_require_rdma: none of `movers` may be used then")

    @property
    def mover_names(self) -> tuple[str, ...]:
        """The ways to other daemons' memory that may be used."""
        if self.movers == "auto":
            return MOVERS
        return tuple(dict.fromkeys(word.strip() for word in self.movers.split(",")))

    @property
    def peer_bandwidth_bytes(self) -> int:
        return parse_bytes(self.peer_bandwidth)

    def _check_units(self) -> None:
        for small, large, times in (("chunk", "cpu", 1), ("ssd_segment", "ssd_capacity", 3)):
            unit, whole = parse_bytes(getattr(self, small)), parse_bytes(getattr(self, large))
            if unit * times > whole and (self.ssd or large == "cpu"):
                raise ConfigError(
                    f"{large}: {whole} bytes do not hold {times} x {small} ({unit} bytes)"
                )

    @property
    def cpu_bytes(self) -> int:
        return parse_bytes(self.cpu)

    def chunk_bytes(self, block_bytes: int) -> int:
        """Return the chunk size for an arena whose first blocks have `block_bytes`."""
        page = 4096
        chunk = parse_bytes(self.chunk) or min(64 << 20, max(1 << 20, self.cpu_bytes // 64))
        # One slot and its page of headers must fit, whatever the arena's size.
        needed = -(-block_bytes // page) * page + page
        chunk = max(chunk, needed)
        return -(-chunk // page) * page


@dataclass(frozen=True)
class TenantConfig:
    """One `[tenants.NAME]` table: who the tenant is, and how much it may have."""

    uids: tuple[int, ...] = setting((), "users whose processes are this tenant")
    token_file: str = setting("", "file (mode 0600) with the secret that proves this tenant")
    cpu_quota: int | str = setting(0, "bytes of DRAM; 0: no bound")
    ssd_quota: int | str = setting(0, "bytes on ssd; 0: no bound")

    def __post_init__(self) -> None:
        for name in ("cpu_quota", "ssd_quota"):
            object.__setattr__(self, name, parse_bytes(getattr(self, name), name))
        if not isinstance(self.uids, (list, tuple)) or not all(
            _is_a(int, uid) and 0 <= uid < 1 << 32 for uid in self.uids
        ):
            raise ConfigError(f"uids: {self.uids!r} is not a list of user ids")
        object.__setattr__(self, "uids", tuple(self.uids))
        if not isinstance(self.token_file, str):
            raise ConfigError(f"token_file: {self.token_file!r} is not a path")

    @property
    def cpu_quota_bytes(self) -> int:
        return parse_bytes(self.cpu_quota)

    @property
    def ssd_quota_bytes(self) -> int:
        return parse_bytes(self.ssd_quota)


def _tenant(name: str, table: object) -> TenantConfig:
    if isinstance(table, TenantConfig):
        return table
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or name == "default":
        raise ConfigError(f"tenants.{name}: not a name of letters, digits, '.', '_' and '-'")
    if not isinstance(table, dict):
        raise ConfigError(f"tenants.{name}: {table!r} is not a table")
    known = {declared.name for declared in fields(TenantConfig)}
    unknown = sorted(set(table) - known)
    if unknown:
        raise ConfigError(
            f"tenants.{name}.{unknown[0]}: no such setting; there are {', '.join(sorted(known))}"
        )
    try:
        return TenantConfig(**table)
    except ConfigError as error:
        raise ConfigError(f"tenants.{name}.{error}") from error


@dataclass(frozen=True)
class DaemonConfig(StoreConfig):
    """The daemon, `kvstore serve`: an embedded store's settings and these."""

    listen: str = setting("", "unix:/path; default kvstore.sock in the user's runtime directory")
    tcp: str = setting("", "host:port for clients of other hosts; default none")
    token_file: str = setting(
        "", "file (mode 0600) with the secret that TCP clients prove, and HTTP asks for"
    )
    tls_cert: str = setting("", "PEM file of the certificate that `tcp` shows: it speaks TLS then")
    tls_key: str = setting("", "PEM file of its private key, mode 0600")
    tls_ca: str = setting(
        "", "PEM file of who signs clients' certificates: those without one are refused then"
    )
    peer_listen: str = setting(
        "",
        "host (an address of this machine) on which other daemons read blocks; default: that of "
        "`tcp`, or 127.0.0.1",
    )
    http: str = setting("127.0.0.1:9470", "host:port of metrics and status page; empty: none")
    client_writes: ClientWrites = setting(
        "in_place",
        "in_place, or copy: puts go through the socket, no client maps the arena writable",
    )
    hold_seconds: float = setting(600.0, "how long DRAM content outlives a daemon that died")
    state: str = setting("", "directory of lock and holder; default beside the socket")
    scrub: int | str = setting("16MiB", "bytes a second that are checked in background; 0: none")
    io_threads: int = setting(2, "threads that answer clients")
    log_level: LogLevel = setting("info", "debug, info, warning or error")
    log_format: LogFormat = setting("text", "text or json")
    trace: str = setting("", "OTLP endpoint for traces; default none")
    tenants: dict[str, TenantConfig] = field(
        default_factory=dict, metadata={"help": "tables [tenants.NAME]"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scrub", parse_bytes(self.scrub, "scrub"))
        _check_choices(self, client_writes=ClientWrites, log_level=LogLevel, log_format=LogFormat)
        texts = ("listen", "tcp", "token_file", "peer_listen", "http", "state", "trace")
        for name in (*texts, "tls_cert", "tls_key", "tls_ca"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not text")
        if not self.listen:
            object.__setattr__(self, "listen", f"unix:{runtime_directory() / 'kvstore.sock'}")
        _named("listen", unix_path, self.listen)
        for name in ("tcp", "http"):
            if getattr(self, name):
                _named(name, tcp_address, getattr(self, name))
        if not self.state:
            object.__setattr__(self, "state", str(self.socket_path.with_suffix(".state")))
        if not _is_a((int, float), self.hold_seconds) or not 0 <= self.hold_seconds < 1e9:
            raise ConfigError(f"hold_seconds: {self.hold_seconds!r} is not a number of seconds")
        if not _is_a(int, self.io_threads) or not 1 <= self.io_threads <= 64:
            raise ConfigError(f"io_threads: {self.io_threads!r} is not between 1 and 64")
        self._check_tls()
        self._check_peer_host()
        self._check_tenants()

    def _check_tls(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            missing = "tls_key" if self.tls_cert else "tls_cert"
            raise ConfigError(f"{missing}: a certificate needs its key, and a key its certificate")
        if self.tls_ca and not self.tls_cert:
            raise ConfigError("tls_ca: clients are asked for certificates by TLS; give tls_cert")
        if self.tls_cert and not self.tcp:
            raise ConfigError("tls_cert: it is for `tcp`, which is not set")

    def _check_tenants(self) -> None:
        if not isinstance(self.tenants, dict):
            raise ConfigError(f"tenants: {self.tenants!r} is not tables [tenants.NAME]")
        tenants = {name: _tenant(name, table) for name, table in self.tenants.items()}
        object.__setattr__(self, "tenants", tenants)
        owners: dict[int, str] = {}
        for name, tenant in tenants.items():
            for uid in tenant.uids:
                if uid in owners:
                    raise ConfigError(
                        f"tenants.{name}.uids: user {uid} is tenant {owners[uid]} already"
                    )
                owners[uid] = name

    @property
    def socket_path(self) -> Path:
        return unix_path(self.listen)

    @property
    def scrub_bytes_per_second(self) -> int:
        return parse_bytes(self.scrub)

    def _check_peer_host(self) -> None:
        if self.peer_token and self.peer_host in ("0.0.0.0", "::"):
            raise ConfigError(
                f"peer_listen: {self.peer_host} tells other daemons nothing; give an address of "
                f"this machine that they reach"
            )

    @property
    def peer_host(self) -> str:
        """Where other daemons read blocks."""
        if self.peer_listen or not self.tcp:
            return self.peer_listen or "127.0.0.1"
        return tcp_address(self.tcp)[0]

    @property
    def is_open_to_the_network(self) -> bool:
        """Whether other hosts can reach `tcp`."""
        return bool(self.tcp) and not is_loopback(tcp_address(self.tcp)[0])


def _named(name: str, parse: Any, value: str) -> None:
    try:
        parse(value)
    except ConfigError as error:
        raise ConfigError(f"{name}: {str(error).partition(': ')[2]}") from error


def _all_names() -> set[str]:
    return {declared.name for declared in fields(DaemonConfig)}


def load_config(
    path: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    **overrides: Any,
) -> StoreConfig:
    """Return an embedded store's settings: from a TOML file, the environment, then `overrides`.

    Settings of the daemon in the file or the environment are left alone.

    Args:
        path: a TOML file whose top-level keys are settings; None for none.
        environ: variables to read `KVSTORE_*` from; None for the process's own.
        overrides: settings that win; those that are None are left out.

    Raises:
        ConfigError: the file is missing or not TOML, a name is unknown, or a value is wrong.
    """
    found = collect(
        StoreConfig, _all_names(), path, environ, overrides, origin=lambda _: "argument"
    )
    return build(StoreConfig, found)


def load_daemon_config(
    path: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    **flags: Any,
) -> tuple[DaemonConfig, dict[str, Setting]]:
    """Return the daemon's settings as `load_config` does, and which of them were set, and where."""
    found = collect(
        DaemonConfig,
        _all_names(),
        path,
        environ,
        flags,
        origin=lambda name: "--" + name.replace("_", "-"),
    )
    return build(DaemonConfig, found), found


def default_address() -> str:
    """Return where a daemon of this user listens unless it is told otherwise.

    Raises:
        ConfigError: a `KVSTORE_*` variable is wrong.
    """
    return load_daemon_config()[0].listen
