"""Guests, each booted once for all tests that ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.daemon.daemon_support import wait_until
from tests.rdma.guest import Guest
from tests.rdma.kernel import Kernel, UnavailableError, prepare

DEVICE = "rxe0"


@pytest.fixture(scope="session")
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """What was downloaded is kept in pytest's cache, next to the checkout."""
    try:
        return prepare(Path(request.config.cache.mkdir("guest-kernel")))
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guests")


@pytest.fixture(scope="session")
def guest(kernel: Kernel, directory: Path) -> Iterator[Guest]:
    """A machine with an RDMA device. Both ends of a transfer are on it.

    Its device has IPv6 addresses only: over IPv4, UCX before 1.19 drops what soft-RoCE receives by
    ud (README.md), with which rc begins too.
    """
    guest = Guest(kernel, directory)
    try:
        _done(guest, "ip", "link", "add", "rdma0", "type", "veth", "peer", "name", "rdma1")
        _done(guest, "ip", "link", "set", "rdma1", "up")
        _make_device(guest, "rdma0", "fd77::1/64")
        yield guest
    finally:
        guest.close()


@pytest.fixture(scope="session")
def pair(kernel: Kernel, directory: Path) -> Iterator[tuple[Guest, Guest]]:
    """Two machines joined by a wire: fd77::1 and fd77::2, for TCP also 10.77.0.1 and 10.77.0.2.

    The IPv4 addresses are those of `lo`: the RDMA device has none, as with `guest`.
    """
    wire = directory / "wire"
    guests: list[Guest] = []

    def boot(number: int) -> Guest:
        guests.append(Guest(kernel, directory, f"guest-{number}", number=number, wire=wire))
        return guests[-1]

    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(boot, 0)
            wait_until(wire.exists)
            second = pool.submit(boot, 1)
        for number, guest in enumerate((first.result(), second.result()), start=1):
            _make_device(guest, "eth0", f"fd77::{number}/64")
            _done(guest, "ip", "addr", "add", f"10.77.0.{number}/32", "dev", "lo")
            way = ("10.77.0.0/24", "dev", "eth0", "src", f"10.77.0.{number}")
            _done(guest, "ip", "route", "add", *way)
        yield first.result(), second.result()
    finally:
        for guest in guests:
            guest.close()


def _make_device(guest: Guest, interface: str, address: str) -> None:
    _done(guest, "ip", "link", "set", interface, "up")
    _done(guest, "ip", "addr", "add", address, "dev", interface, "nodad")
    _done(guest, "rdma", "link", "add", DEVICE, "type", "rxe", "netdev", interface)


def _done(guest: Guest, *command: str) -> None:
    finished = guest.run(*command)
    if finished.status != 0:
        pytest.fail(f"{' '.join(command)}: {finished.output}")
