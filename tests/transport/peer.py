"""A process with an endpoint, for tests of what is at the other end: it obeys lines of JSON.

    ours -> {"do": "register", "bytes": 1048576, "writable": true, "seed": 3}
    peer -> {"region": "<RegionInfo>"}

Its regions hold `pattern(seed)`. It ends with its standard input.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore import KVStoreError, _native
from kvstore.transport import Endpoint, EndpointInfo, RegionInfo, SharedMemory, TransportSettings


def _tasks(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").glob("*/stat"))


def pattern(seed: int, num_bytes: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


class Peer:
    """The other process, seen from here.

    Args:
        settings: of its endpoint.
        secret: of its endpoint; default: random.
        prefix: of its command line, such as `ip netns exec NAME`.
    """

    def __init__(
        self,
        settings: TransportSettings | None = None,
        secret: bytes | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.transport.peer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started = msgspec.to_builtins(settings or TransportSettings())
        self._send({"settings": started, "secret": secret.hex() if secret else None})
        first = self._receive()
        self.pid: int = first["pid"]

    def _send(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the peer died with {self._process.wait()}"
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self._send({"do": do, **arguments})
        return self._receive()

    def info(self) -> EndpointInfo:
        return EndpointInfo.decode(base64.b64decode(self.ask("info")["info"]))

    def register(
        self, num_bytes: int, *, writable: bool = False, seed: int = 0, shared: bool = True
    ) -> RegionInfo:
        answer = self.ask("register", bytes=num_bytes, writable=writable, seed=seed, shared=shared)
        return msgspec.msgpack.decode(base64.b64decode(answer["region"]), type=RegionInfo)

    def deregister(self, region_id: int) -> bool:
        return bool(self.ask("deregister", region=region_id)["done"])

    def contents(self, region_id: int) -> int:
        """The XXH3-64 of all of a region."""
        return int(self.ask("contents", region=region_id)["sum"])

    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Freeze it."""
        os.kill(self.pid, signal.SIGSTOP)
        # The signal takes a moment, in which it could still answer.
        while any(b") T" not in task.read_bytes() for task in _tasks(self.pid)):
            time.sleep(0.001)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        if self._process.poll() is None:
            self.go_on()
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()


class _Served:
    """The commands, in the peer."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._regions: dict[int, Any] = {}

    def info(self) -> dict[str, Any]:
        return {"info": base64.b64encode(self._endpoint.info().encode()).decode()}

    def register(self, bytes: int, writable: bool, seed: int, shared: bool) -> dict[str, Any]:
        memory = SharedMemory(bytes) if shared else np.empty(bytes, np.uint8)
        array = memory.array if isinstance(memory, SharedMemory) else memory
        array[:] = pattern(seed, bytes)
        region = self._endpoint.register(memory, writable=writable)
        self._regions[region.region_id] = (region, memory, array)
        described = msgspec.msgpack.encode(self._endpoint.describe(region))
        return {"region": base64.b64encode(described).decode()}

    def deregister(self, region: int) -> dict[str, Any]:
        return {"done": self._endpoint.deregister(self._regions[region][0], timeout=1.0)}

    def contents(self, region: int) -> dict[str, Any]:
        return {"sum": _native.xxh3(self._regions[region][2])}


def main() -> None:
    first = json.loads(sys.stdin.readline())
    settings = msgspec.convert(first["settings"], TransportSettings)
    secret = bytes.fromhex(first["secret"]) if first["secret"] else None

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps({**answer, "pid": os.getpid()}), flush=True)  # noqa: T201

    try:
        endpoint = Endpoint(settings, secret=secret)
    except KVStoreError as error:
        say({"error": str(error)})
        return
    with endpoint:
        served = _Served(endpoint)
        say({})
        for line in sys.stdin:
            command = json.loads(line)
            say(getattr(served, command.pop("do"))(**command))


if __name__ == "__main__":
    main()
