"""Two hosts on one machine: network namespaces, joined by a virtual cable (veth).

Each host has its own interfaces, addresses, routes and firewall, so the cable can be cut, made to
lose packets and be made slow. Needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN) and `ip` (Debian:
iproute2); losing packets needs `nft` (nftables), a rate limit `tc` (iproute2).

The hosts share this machine's processes, files, memory and boot id. Both ends of the cable are made
inside the namespaces, so nothing but two names is left in this one; those of runs that died are
removed by the next run. Hosts are known by names `kvstore-PID-START-NUMBER-a|b`.

Thread safety: none but for `Host.call`, `command` and `popen`.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from kvstore.daemon.processes import is_alive, process_start

Result = TypeVar("Result")

INTERFACE = "veth0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
_NAMED = Path("/run/netns")
_NAME = re.compile(r"kvstore-(\d+)-(\d+)-\d+-[ab]")
_CLONE_NEWNET = 0x40000000
_TOOL_SECONDS = 20.0
_TABLE = "kvstore_loss"
_START = (
    "import importlib, json, sys; module, name = sys.argv[1:3];"
    "sys.path[:], *arguments = json.loads(sys.argv[3]);"
    "getattr(importlib.import_module(module), name)(*arguments)"
)
_numbers = itertools.count()


class HostsUnavailableError(Exception):
    """This machine, or what we may do on it, does not allow two hosts. Says what is missing."""


class Host:
    """One of the two: `address` is where the other one reaches it."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.interface = INTERFACE

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs `arguments` on this host. It mounts /sys anew, from where
        programs learn of devices (UCX does)."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def popen(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(self.command(*arguments), **options)

    def run(
        self, arguments: Sequence[str], timeout: float = 60.0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; fails when the command does."""
        return subprocess.run(
            self.command(*arguments), timeout=timeout, check=True, text=True, **options
        )

    def start_python(
        self, module: str, function: str, *arguments: Any, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a Python that imports `module` and calls its `function`; arguments go as JSON. It
        imports from where we do."""
        return self.popen(
            [sys.executable, "-c", _START, module, function, json.dumps([sys.path, *arguments])],
            **options,
        )

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call it in a thread of ours that is on this host: sockets that it makes are, and stay.
        /sys is this process's, so this is not for UCX."""
        results: list[Result] = []
        errors: list[BaseException] = []

        def there() -> None:
            try:
                _enter(self.name)
                results.append(function(*arguments))
            except BaseException as error:  # noqa: BLE001 (raised again below, in the caller)
                errors.append(error)

        thread = threading.Thread(target=there, name=self.name)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out. Out: packets vanish and nobody is told."""
        _tool("ip", "-n", self.name, "link", "set", INTERFACE, "up" if up else "down")

    def lose(self, fraction: float) -> None:
        """Drop that part of the packets that arrive (to within 1 in 10,000); 0: none."""
        with contextlib.suppress(HostsUnavailableError):
            self._nft(f"delete table inet {_TABLE}")
        if fraction > 0:
            self._nft(
                f"add table inet {_TABLE};"
                f"add chain inet {_TABLE} arrive {{ type filter hook input priority 0; }};"
                f"add rule inet {_TABLE} arrive iifname {INTERFACE}"
                f" numgen random mod 10000 < {round(fraction * 10000)} drop"
            )

    def limit(self, bytes_per_second: int) -> None:
        """Send no faster than this; 0: as fast as it goes."""
        with contextlib.suppress(HostsUnavailableError):  # there may be no limit yet
            _tool("tc", "-n", self.name, "qdisc", "del", "dev", INTERFACE, "root")
        if bytes_per_second > 0:
            # A bucket of 4 ms: less would not reach high rates, more would let bursts through.
            burst = max(bytes_per_second // 250, 64 << 10)
            _tool(
                *("tc", "-n", self.name, "qdisc", "add", "dev", INTERFACE, "root", "tbf"),
                *("rate", f"{bytes_per_second * 8}bit", "burst", str(burst), "latency", "50ms"),
            )

    def sent_bytes(self) -> int:
        """What has gone into the cable from here, headers included."""
        shown = _tool("ip", "-n", self.name, "-s", "-j", "link", "show", "dev", INTERFACE)
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])

    def processes(self) -> list[int]:
        return [int(pid) for pid in _tool("ip", "netns", "pids", self.name).split()]

    def _nft(self, rules: str) -> None:
        _tool(*self.command("nft", rules))


class TwoHosts:
    """`a` and `b`, joined. Ends with `close`, which kills what still runs on them.

    Raises:
        HostsUnavailableError: why there can be none.
    """

    def __init__(self) -> None:
        if shutil.which("ip") is None:
            raise HostsUnavailableError("no `ip` (Debian: apt-get install iproute2)")
        if os.geteuid() != 0:
            raise HostsUnavailableError("network namespaces need root")
        _sweep()
        pid = os.getpid()
        stem = f"kvstore-{pid}-{process_start(pid)}-{next(_numbers)}"
        self.a, self.b = (
            Host(f"{stem}-{letter}", address)
            for letter, address in zip("ab", ADDRESSES, strict=True)
        )
        try:
            self._join()
        except BaseException:
            self.close()
            raise

    def _join(self) -> None:
        for host in self.hosts:
            _tool("ip", "netns", "add", host.name)
        a, b = self.a.name, self.b.name
        _tool(
            *("ip", "link", "add", INTERFACE, "netns", a),
            *("type", "veth", "peer", "name", INTERFACE, "netns", b),
        )
        for host in self.hosts:
            _tool("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _tool("ip", "-n", host.name, "link", "set", "lo", "up")
            host.set_link(True)
        self._wait_until_up()

    def _wait_until_up(self) -> None:
        """The kernel tells of a carrier late, and UCX uses no device that has none."""
        give_up = time.monotonic() + _TOOL_SECONDS
        for host in self.hosts:
            while "state UP" not in _tool("ip", "-n", host.name, "link", "show", INTERFACE):
                if time.monotonic() > give_up:
                    raise HostsUnavailableError(f"{host.name}: the link does not come up")
                time.sleep(0.01)

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.a, self.b

    def cut(self) -> None:
        """Nothing passes any more, and neither side is told."""
        self.b.set_link(False)

    def lose(self, fraction: float) -> None:
        """Drop that part of the packets, in either direction."""
        for host in self.hosts:
            host.lose(fraction)

    def limit(self, bytes_per_second: int) -> None:
        """At most that much in either direction; 0: no limit."""
        for host in self.hosts:
            host.limit(bytes_per_second)

    def heal(self) -> None:
        """Joined, without loss and limit."""
        self.b.set_link(True)
        self._wait_until_up()
        self.lose(0)
        self.limit(0)

    def close(self) -> None:
        for host in self.hosts:
            _remove(host.name)

    def __enter__(self) -> TwoHosts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    with TwoHosts() as hosts:
        yield hosts


def _tool(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_TOOL_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostsUnavailableError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise HostsUnavailableError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _enter(name: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(_NAMED / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {name}")
    finally:
        os.close(descriptor)


def _remove(name: str) -> None:
    """Kill what runs in it, and remove its name; both go on when there is nothing to do."""
    if not (_NAMED / name).exists():
        return
    give_up = time.monotonic() + _TOOL_SECONDS
    while time.monotonic() < give_up:
        with contextlib.suppress(HostsUnavailableError):
            # A thread of ours may be there, by `Host.call`: never kill ourselves.
            inside = {int(pid) for pid in _tool("ip", "netns", "pids", name).split()}
            pids = inside - {os.getpid()}
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if any(process_start(pid) for pid in pids):
                time.sleep(0.01)
                continue
        break
    with contextlib.suppress(HostsUnavailableError):
        _tool("ip", "netns", "delete", name)


def _sweep() -> None:
    """Remove hosts of runs that died before they could."""
    if not _NAMED.is_dir():
        return
    for path in _NAMED.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and not is_alive(int(match[1]), int(match[2])):
            _remove(path.name)
