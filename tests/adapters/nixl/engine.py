"""An engine with an agent of its own, as vLLM's NixlConnector has one: nothing of ours.

It registers a tensor a layer, says metadata and base addresses on stdout, and then does what lines
of JSON on stdin ask: {"read": {...}}, {"digest": layer}, {"notices": 1}. Ends by os._exit.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import sys
import time
from typing import Any

import numpy as np

LAYERS, BLOCKS, BLOCK_BYTES = 3, 32, 16384


def find_nixl() -> Any:
    for name in ("nixl_cu13", "nixl_cu12"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError("nixl")


def layers() -> list[Any]:
    """The bytes that the engine begins with; tests know them too."""
    return [
        np.random.default_rng(layer).integers(0, 256, BLOCKS * BLOCK_BYTES, np.uint8)
        for layer in range(LAYERS)
    ]


class Engine:
    def __init__(self) -> None:
        nixl = find_nixl()
        self.agent = nixl.nixl_agent(f"engine-{os.getpid()}", nixl.nixl_agent_config())
        self.layers = layers()
        self.descriptors = [(x.ctypes.data, x.nbytes, 0, "") for x in self.layers]
        self.agent.register_memory(self.descriptors, "DRAM")

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.agent.name,
            "metadata": base64.b64encode(self.agent.get_agent_metadata()).decode(),
            "base_addresses": [address for address, *_ in self.descriptors],
        }

    def read(self, metadata: str, pieces: list[list[int]], notice: str) -> str:
        """Pieces (address, bytes) of the peer into layer 0, one after the other: their digest."""
        peer = self.agent.add_remote_agent(base64.b64decode(metadata))
        peer = peer.decode() if isinstance(peer, bytes) else peer
        at, ours = self.descriptors[0][0], []
        for _, num_bytes in pieces:
            ours.append((at, num_bytes, 0))
            at += num_bytes
        local = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", ours, "DRAM")
        remote = self.agent.prep_xfer_dlist(peer, [(a, n, 0) for a, n in pieces], "DRAM")
        picked = list(range(len(pieces)))
        transfer = self.agent.make_prepped_xfer(
            "READ", local, picked, remote, picked, notice.encode()
        )
        state = self.agent.transfer(transfer)
        while state == "PROC":
            time.sleep(0.0005)
            state = self.agent.check_xfer_state(transfer)
        if state != "DONE":
            return str(state)
        return hashlib.sha256(self.layers[0][: at - self.descriptors[0][0]]).hexdigest()

    def answer(self, asked: dict[str, Any]) -> Any:
        if "read" in asked:
            return self.read(**asked["read"])
        if "digest" in asked:
            return hashlib.sha256(self.layers[asked["digest"]]).hexdigest()
        notices = self.agent.get_new_notifs()
        return {
            name: [base64.b64encode(n).decode() for n in said] for name, said in notices.items()
        }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # NIXL logs to stdout
    engine = Engine()
    answers.write(json.dumps(engine.describe()) + "\n")
    for line in sys.stdin:
        try:
            answer = engine.answer(json.loads(line))
        except Exception as error:  # noqa: BLE001 (told to the test)
            answer = repr(error)
        answers.write(json.dumps(answer) + "\n")
    os._exit(0)


if __name__ == "__main__":
    main()
