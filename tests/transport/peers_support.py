"""Daemons that are peers, in this process, and what their blocks hold."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kvstore
from kvstore.config import DaemonConfig
from kvstore.daemon.service import Service
from kvstore.errors import KVStoreError
from kvstore.transport import MOVERS, Endpoint, TransportSettings

SPEC = kvstore.BlockSpec(1, 1, 64, 16, "float32")
SIZE = SPEC.block_bytes
NAMESPACE = kvstore.Namespace("model", SPEC)
SECONDS = 20.0
NAMES = (*MOVERS, "frames")
SECRET = "peers-" + "x" * 32


def token(directory: Path, text: str = SECRET) -> str:
    path = directory / "peers.token"
    path.touch(0o600)
    path.write_text(text)
    return str(path)


@contextlib.contextmanager
def serving(
    directory: Path, name: str, *, secret: str = SECRET, **settings: Any
) -> Iterator[Service]:
    """A daemon with peers. It is away as soon as it is stopped: nothing keeps its arena."""
    home = directory / name
    home.mkdir()
    given: dict[str, Any] = {
        "cpu": "4MiB",
        "chunk": "256KiB",
        "listen": f"unix:{home}/s",
        "tcp": "127.0.0.1:0",
        "http": "",
        "hold_seconds": 0.0,
        "scrub": 0,
        "peer_token": token(home, secret),
        **settings,
    }
    with Service(DaemonConfig(**given)) as service:
        yield service


def address_of(service: Service) -> str:
    """Where other daemons find it."""
    return next(one for one in service.addresses if one.startswith(("tcp:", "tls:")))


@contextlib.contextmanager
def client_of(
    service: Service, namespace: kvstore.Namespace = NAMESPACE, tenant: str = ""
) -> Iterator[kvstore.Store]:
    with kvstore.connect(service.config.listen, namespace, tenant=tenant) as store:
        yield store


def chain(first: int, count: int) -> kvstore.BlockHashes:
    return kvstore.hash_blocks(list(range(first * 1000, first * 1000 + count * 16)), 16)


def content(first: int, count: int, size: int = SIZE) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(first).integers(0, 256, (count, size), np.uint8)


def put(store: kvstore.Store, first: int, count: int) -> None:
    blocks = content(first, count, store.namespace.spec.block_bytes)
    assert (
        store.put(chain(first, count), kvstore.ContiguousBlocks(blocks)).wait().num_blocks == count
    )


def loaded(
    store: kvstore.Store, first: int, count: int, holders: list[str], timeout: float = 10.0
) -> int:
    """Load, see that what arrived is exactly what was put, and return how much did."""
    size = store.namespace.spec.block_bytes
    blocks = np.zeros((count, size), np.uint8)
    transfer = store.load(
        chain(first, count), kvstore.ContiguousBlocks(blocks), holders=holders, timeout=timeout
    )
    found = transfer.wait().num_blocks
    np.testing.assert_array_equal(blocks[:found], content(first, count, size)[:found])
    return found


def metrics(service: Service) -> dict[str, Any]:
    found: dict[str, Any] = service.status()["metrics"]
    return found


def works(mover: str) -> str:
    """Why a mover does not work here; "" if it does."""
    try:
        Endpoint(TransportSettings(movers=(mover,))).close()
    except (KVStoreError, ModuleNotFoundError) as error:
        return str(error)
    return ""


def fetched(values: dict[str, Any]) -> dict[str, int]:
    """Blocks that were fetched, by mover."""
    found = {
        name: values[f"kvstore_peer_fetched_{name}_blocks_total"] for name in (*MOVERS, "frames")
    }
    return {name: count for name, count in found.items() if count}


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.002)
