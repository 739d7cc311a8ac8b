"""Clients on a store that this process shares, and memory as addresses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kvstore
from kvstore_adapters.mooncake import MooncakeDistributedStore

OK, NO_ROOM, INVALID, NOT_FOUND, WRONG_SIZE, AWAY = 0, -200, -600, -704, -800, -900


def client(address: str, **settings: Any) -> MooncakeDistributedStore:
    store = MooncakeDistributedStore()
    assert store.setup({"master_server_addr": address, "timeout": "10", **settings}) == OK
    return store


@contextlib.contextmanager
def shared(directory: Path, **settings: Any) -> Iterator[str]:
    """The address of an embedded store that this process shares."""
    settings = {"cpu": "16MiB", "chunk": "1MiB", **settings}
    with (
        kvstore.open(kvstore.BlockSpec.of_bytes(64), **settings) as store,
        kvstore.share(store, f"unix:{directory}/s") as server,
    ):
        del server
        yield f"unix:{directory}/s"


class Memory:
    """An array that is registered with some clients, and addresses in it."""

    def __init__(self, num_bytes: int, *clients: MooncakeDistributedStore) -> None:
        self.array: npt.NDArray[np.uint8] = np.random.default_rng(1).integers(
            0, 256, num_bytes, np.uint8
        )
        for one in clients:
            assert one.register_buffer(self.at(0), num_bytes) == OK

    def at(self, offset: int) -> int:
        return int(self.array.ctypes.data) + offset

    def __getitem__(self, part: slice) -> bytes:
        return self.array[part].tobytes()
