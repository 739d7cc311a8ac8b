"""A process with GPU memory, for tests of CUDA IPC: it obeys lines of JSON until its input ends.

Its memory holds a pattern of a seed. `fill` enqueues another pattern on a stream of its own, and
marks the region, so that whoever reads it has to wait for that.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from typing import Any

import msgspec
import numpy as np

from kvstore import KVStoreError, _native
from kvstore.gpu import CudaDevice
from kvstore.gpu.driver import Driver
from kvstore.transport import Endpoint, EndpointInfo, Link, Region, RegionInfo, TransportSettings
from tests.transport.peer import pattern


class IpcPeer:
    """The other process, seen from here. `library`: its driver."""

    def __init__(self, library: str, *, late: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.ipc_peer", library, str(int(late))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the peer died with {self.process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def info(self) -> EndpointInfo:
        return EndpointInfo.decode(base64.b64decode(self.ask("info")["info"]))

    def register(
        self, num_bytes: int, *, offset: int = 0, writable: bool = False, seed: int = 0
    ) -> RegionInfo:
        answer = self.ask("register", bytes=num_bytes, offset=offset, writable=writable, seed=seed)
        return msgspec.msgpack.decode(base64.b64decode(answer["region"]), type=RegionInfo)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


class _Here:
    """The peer's side."""

    def __init__(self, library: str, late: bool) -> None:
        settings = TransportSettings(movers=("cuda",), cuda_library=library)
        self.endpoint = Endpoint(settings)
        self.device = CudaDevice(driver=Driver(library) if library else None)
        self.stream = self.device.new_stream()
        self.regions: dict[int, Region] = {}
        self.links: list[Link] = []
        if late:
            import ctypes

            ctypes.CDLL(library).fake_set_late(1)

    def register(self, asked: dict[str, Any]) -> dict[str, Any]:
        memory = self.device.allocate(asked["offset"] + asked["bytes"] + 64)
        address = memory.address + asked["offset"]
        self.device.write(address, pattern(asked["seed"], asked["bytes"]))
        region = self.endpoint.register((address, asked["bytes"]), writable=asked["writable"])
        self.regions[region.region_id] = region
        info = self.endpoint.describe(region)
        return {"region": base64.b64encode(msgspec.msgpack.encode(info)).decode()}

    def fill(self, asked: dict[str, Any]) -> dict[str, Any]:
        region = self.regions[asked["region"]]
        source = self.device.allocate(region.num_bytes)
        self.device.write(source.address, pattern(asked["seed"], region.num_bytes))
        one = [np.array([v], np.uint64) for v in (region.address, source.address, region.num_bytes)]
        self.device.copy(one[0], one[1], one[2], self.stream)
        self.endpoint.mark(region, self.stream)
        return {}

    def run(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Let what is enqueued run."""
        self.device.driver.call("cuStreamSynchronize", self.stream)
        return {}

    def digest(self, asked: dict[str, Any]) -> dict[str, Any]:
        region = self.regions[asked["region"]]
        return {"digest": _native.xxh3(self.device.read(region.address, region.num_bytes))}

    def open(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Open the regions of whoever asks, and keep them so."""
        info = EndpointInfo.decode(base64.b64decode(asked["info"]))
        self.links.append(self.endpoint.connect(info))
        return {}

    def deregister(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"settled": self.endpoint.deregister(self.regions[asked["region"]], 0.0)}

    def info(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"info": base64.b64encode(self.endpoint.info().encode()).decode()}


def main() -> None:
    here = _Here(sys.argv[1], sys.argv[2] == "1")
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(here, asked["do"])(asked)
        except KVStoreError as error:
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
