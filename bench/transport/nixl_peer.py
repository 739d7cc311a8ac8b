"""NIXL, as engines use it: an agent each side, UCX as its back end, descriptors prepared once.

Options: `tls` for UCX_TLS, `segment` for the size of UCX's TCP segments (its own default: 8 KiB).
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import time
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

TIMEOUT = 20.0
HUGE_PAGE = 2 << 20


class Peer:
    def __init__(self, options: dict[str, Any]) -> None:
        # UCX reads these when the agent starts; they are this process's own.
        if options.get("tls"):
            os.environ["UCX_TLS"] = options["tls"]
        if options.get("devices"):
            os.environ["UCX_NET_DEVICES"] = options["devices"]
        if options.get("segment"):
            os.environ["UCX_TCP_TX_SEG_SIZE"] = options["segment"]
            os.environ["UCX_TCP_RX_SEG_SIZE"] = options["segment"]
        api, self.version = _import()
        self.agent = api.nixl_agent(f"kvstore-bench-{os.getpid()}", api.nixl_agent_config())
        self.prepared: dict[tuple[int, int], tuple[Any, Any]] = {}

    def memory(self, num_bytes: int) -> Bytes:
        """On huge pages where the kernel gives them: NIXL is faster by a third on them."""
        room = np.empty(num_bytes + HUGE_PAGE, np.uint8)
        start = -room.ctypes.data % HUGE_PAGE
        memory = room[start : start + num_bytes]
        memory[:] = 1
        return memory

    def _register(self, memory: Bytes) -> None:
        self.own = (memory.ctypes.data, memory.nbytes)
        self.agent.register_memory([(*self.own, 0, "")], "DRAM")

    def serve(self, memory: Bytes) -> str:
        self._register(memory)
        metadata = base64.b64encode(self.agent.get_agent_metadata()).decode()
        return json.dumps({"metadata": metadata, "memory": self.own})

    def connect(self, hello: str, memory: Bytes) -> None:
        self._register(memory)
        said = json.loads(hello)
        self.remote = self.agent.add_remote_agent(base64.b64decode(said["metadata"]))
        if isinstance(self.remote, bytes):
            self.remote = self.remote.decode()
        self.theirs = tuple(said["memory"])

    def _lists(self, size: int) -> tuple[Any, Any]:
        """Every block of that size, on either side; prepared once, as an engine does."""
        key = (size, size)
        if key not in self.prepared:
            self.prepared[key] = (
                self._list("", self.own, size),
                self._list(self.remote, self.theirs, size),
            )
        return self.prepared[key]

    def _list(self, agent: str, memory: tuple[int, int], size: int) -> Any:
        address, num_bytes = memory
        blocks = [(address + at, size, 0) for at in range(0, num_bytes - size + 1, size)]
        return self.agent.prep_xfer_dlist(agent or "NIXL_INIT_AGENT", blocks, "DRAM")

    def read(self, offset: int, at: int, size: int, batch: int) -> None:
        local, remote = self._lists(size)
        into, source = at // size, offset // size
        transfer = self.agent.make_prepped_xfer(
            "READ",
            local,
            list(range(into, into + batch)),
            remote,
            list(range(source, source + batch)),
        )
        give_up = time.monotonic() + TIMEOUT
        state = self.agent.transfer(transfer)
        while state == "PROC":
            if time.monotonic() > give_up:
                raise TimeoutError("a transfer takes too long")
            state = self.agent.check_xfer_state(transfer)
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")
        self.agent.release_xfer_handle(transfer)


def _import() -> tuple[Any, str]:
    from importlib import metadata

    for name in ("nixl_cu13", "nixl_cu12"):
        try:
            return importlib.import_module(name), metadata.version(name.replace("_", "-"))
        except ImportError:
            continue
    raise ImportError("not installed: pip install --no-deps nixl-cu12 numpy")
