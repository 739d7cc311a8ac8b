"""Runs one store for compare.py in that store's own Python: no two need to agree on versions.

    python -m bench.peers.runner NAME WORK_DIRECTORY

Its first line of JSON on stdout is {"version": ...}, or {"absent": why}. Each line on stdin,
{"size": bytes, "batch": blocks a call, "operations": [...]}, is one round: all blocks are put, then
got, and looked up if asked. Every call is timed, the bytes are compared, and the answer is
{"put": [seconds, ...], "get": [...], ...} or {"error": ...}. The end of stdin ends the runner and
the servers that it started.

Imports nothing but numpy and the store in question. Values live in memory; every store gets them
from one array and gives them into another by the shortest way that its Python interface has.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers import daemons, embedded
from bench.peers.peer import WORKING_BYTES, AbsentError, Peer, aligned

PEERS = {**embedded.PEERS, **daemons.PEERS}


def timed(call: Callable[[int], None], calls: int) -> list[float]:
    clock, seconds = time.perf_counter, []
    for number in range(calls):
        begin = clock()
        call(number)
        seconds.append(clock() - begin)
    return seconds


def one_round(peer: Peer, size: int, batch: int, operations: list[str]) -> dict[str, Any]:
    peer.use(size, batch)
    np.invert(peer.source, out=peer.target)
    calls = {"put": peer.put, "get": peer.get, "lookup": peer.lookup}
    try:
        answer: dict[str, Any] = {name: timed(calls[name], peer.calls) for name in operations}
    finally:
        peer.forget()
    if not np.array_equal(peer.source, peer.target):
        answer = {"error": "what was got is not what was put"}
    return answer


def main() -> None:
    # Libraries print to stdout as they like; only answers may go down the pipe.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    source, target = aligned(WORKING_BYTES), aligned(WORKING_BYTES)
    source[:] = np.frombuffer(np.random.default_rng(0).bytes(WORKING_BYTES), np.uint8)
    try:
        peer = PEERS[sys.argv[1]](Path(sys.argv[2]), source, target)
    except AbsentError as error:
        answers.write(json.dumps({"absent": str(error)}) + "\n")
        return
    answers.write(json.dumps({"version": peer.version}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = one_round(peer, request["size"], request["batch"], request["operations"])
        except Exception as error:  # noqa: BLE001 (whatever it is, the round failed)
            answer = {"error": repr(error)}
        answers.write(json.dumps(answer) + "\n")
    peer.close()
    answers.flush()
    os._exit(0)  # some peers abort or hang in their own clean-up at exit


if __name__ == "__main__":
    main()
