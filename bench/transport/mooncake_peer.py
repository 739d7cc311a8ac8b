"""Mooncake's transfer engine over TCP, the two ends finding each other without a metadata server.

Options: `address`, ours.
"""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_GET = "pip install mooncake-transfer-engine-non-cuda; apt-get install libibverbs1"
PACKAGES = ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine")


class Peer:
    def __init__(self, options: dict[str, Any]) -> None:
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise ImportError(f"{error}: {_GET}") from error

        self.version = next(filter(None, map(_version, PACKAGES)), "")
        self.engine = TransferEngine()
        if self.engine.initialize(options["address"], "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError("the transfer engine does not start")
        self.address = options["address"]

    def memory(self, num_bytes: int) -> Bytes:
        room = np.ones(num_bytes + 4096, np.uint8)
        start = -room.ctypes.data % 4096
        return room[start : start + num_bytes]

    def _register(self, memory: Bytes) -> None:
        self.own = memory.ctypes.data
        if self.engine.register_memory(self.own, memory.nbytes) != 0:
            raise RuntimeError("memory cannot be registered")

    def serve(self, memory: Bytes) -> str:
        self._register(memory)
        session = f"{self.address}:{self.engine.get_rpc_port()}"
        return json.dumps({"session": session, "memory": self.own})

    def connect(self, hello: str, memory: Bytes) -> None:
        self._register(memory)
        said = json.loads(hello)
        self.session, self.theirs = said["session"], said["memory"]

    def read(self, offset: int, at: int, size: int, batch: int) -> None:
        into, source = self.own + at, self.theirs + offset
        steps = range(0, batch * size, size)
        status = self.engine.batch_transfer_sync_read(
            self.session, [into + s for s in steps], [source + s for s in steps], [size] * batch
        )
        if status != 0:
            raise RuntimeError(f"a batch failed: {status}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
