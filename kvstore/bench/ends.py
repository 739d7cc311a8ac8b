"""One end of one way to move bytes between processes: memory that is read, or who reads it.

    python ends.py PEER_FILE serve|read

PEER_FILE is a Python file with a class `Peer`; a module of kvstore calls `main` with its own
instead, see `transport_peer`. The first line on stdin is a JSON object of options: `source`, a file
with the bytes that are read; `hello`, what the served end said; and the peer's own; `role` is added
to them. Imports nothing but numpy: it runs by its path in each peer's own Python, which need not
have kvstore.

The served end prints {"hello": ...} and ends with its stdin. The reading end prints {"version":
...}, and then takes lines "SIZE BATCH CALLS FIRST": read CALLS batches of BATCH blocks of SIZE
bytes, the first of them the FIRST batch of the source, each into the next place of the target, both
walked in circles. It answers {"seconds": [...]}, a number a batch, or {"error": ...}, also when the
last batch is not what the source holds, which is compared outside the times. Either end prints
{"absent": why} instead when the peer cannot be had here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

TARGET_BYTES = 64 << 20  # larger than the caches of most machines
_PAGE = 4096


class AbsentError(Exception):
    """What it needs is not installed, or not allowed here."""


class Peer(Protocol):
    """One way. A process has one of it, and either serves or reads."""

    version: str

    def memory(self, num_bytes: int) -> Bytes:
        """Memory of the kind that it moves fastest, touched."""
        ...

    def serve(self, memory: Bytes) -> str:
        """Let others read it; what they must know."""
        ...

    def connect(self, hello: str, memory: Bytes) -> None:
        """Get ready to read from there into this memory."""
        ...

    def read(self, offset: int, at: int, size: int, batch: int) -> None:
        """Read `batch` blocks of `size` bytes that follow each other from `offset` of the served
        memory to `at` of ours. This is what is timed; fails when anything is missing."""
        ...


def page_aligned(num_bytes: int) -> Bytes:
    room = np.ones(num_bytes + _PAGE, np.uint8)
    start = -room.ctypes.data % _PAGE
    return room[start : start + num_bytes]


def _load(path: str) -> Callable[[dict[str, Any]], Peer]:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    peer: Callable[[dict[str, Any]], Peer] = module.Peer
    return peer


def _timed(peer: Peer, sizes: tuple[int, int, int, int], source: Bytes, target: Bytes) -> Any:
    size, batch, calls, first = sizes
    span = size * batch
    seconds, clock = [], time.perf_counter
    offset = at = 0
    for call in range(first, first + calls):
        offset = call % (len(source) // span) * span
        at = call % (len(target) // span) * span
        begin = clock()
        peer.read(offset, at, size, batch)
        seconds.append(clock() - begin)
    if not np.array_equal(target[at : at + span], source[offset : offset + span]):
        return {"error": "what came is not what was sent"}
    return {"seconds": seconds}


def _read(peer: Peer, options: dict[str, Any], answers: Any) -> None:
    source = np.memmap(options["source"], np.uint8, "r")
    target = peer.memory(TARGET_BYTES)
    peer.connect(options.get("hello", ""), target)
    answers.write(json.dumps({"version": peer.version}) + "\n")
    for line in sys.stdin:
        size, batch, calls, first = (int(word) for word in line.split())
        try:
            answer = _timed(peer, (size, batch, calls, first), source, target)
        except Exception as error:  # noqa: BLE001 (whatever it is, the round failed)
            answer = {"error": repr(error)}
        answers.write(json.dumps(answer) + "\n")


def _serve(peer: Peer, options: dict[str, Any], answers: Any) -> None:
    source = np.fromfile(options["source"], np.uint8)
    memory = peer.memory(len(source))
    memory[:] = source
    del source
    answers.write(json.dumps({"hello": peer.serve(memory)}) + "\n")
    sys.stdin.read()


def main(load: Callable[[], Callable[[dict[str, Any]], Peer]], role: str) -> None:
    """Be one end, of the peer that `load` returns the maker of; does not return."""
    # Libraries print to stdout as they like; only answers may go down the pipe.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    options = {**json.loads(sys.stdin.readline()), "role": role}
    try:
        peer = load()(options)
        (_serve if role == "serve" else _read)(peer, options, answers)
    except (AbsentError, ImportError) as error:
        answers.write(json.dumps({"absent": str(error)}) + "\n")
    answers.flush()
    os._exit(0)  # some peers abort or hang in their own clean-up at exit


if __name__ == "__main__":
    # What lies beside this file is not for import by its bare name.
    del sys.path[0]
    main(lambda: _load(sys.argv[1]), sys.argv[2])
