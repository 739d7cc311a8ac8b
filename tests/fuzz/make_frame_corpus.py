"""Write the seed corpus of csrc/fuzz/frame_fuzz.cc: one short session for each operation.

    python tests/fuzz/make_frame_corpus.py [directory]

An input is two bytes (options, pieces) and a stream; see the harness. The files are kept in the
repository, so this runs only when the protocol changes.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np

from kvstore import _native

BLOCK_BYTES = 256
GREETED = 2
RECORDS = 1
NO_NAMESPACE = 4
REFUSING = 8


def frame(
    op: int, body: bytes = b"", *, length: int | None = None, magic: bytes = b"KVS2"
) -> bytes:
    return (
        struct.pack("<4sBBHII", magic, op, 0, 0, len(body) if length is None else length, 1) + body
    )


def record(op: int, body: bytes = b"") -> bytes:
    return struct.pack("<BH", op, len(body)) + body


def hashes(count: int, salt: int = 0) -> bytes:
    return b"".join(bytes([salt + i + 1]) * 32 for i in range(count))


def chain(count: int, start: int = 0, salt: int = 0) -> bytes:
    flags = 1 if start > 0 else 0
    return struct.pack("<qII32s", start, flags, count, b"\x09" * 32) + hashes(count, salt)


def sessions() -> dict[str, bytes]:
    payload = np.arange(2 * BLOCK_BYTES, dtype=np.uint8)
    sums = b"".join(
        _native.xxh3(payload[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES]).to_bytes(8, "little")
        for i in range(2)
    )
    u64 = struct.Struct("<Q").pack
    reserve = struct.pack("<d", 0.0) + chain(2)
    # The core numbers owners, reservations and leases from one count: the client is 1, this is 2.
    commit = struct.pack("<QQQ", 2, 0, 2) + sums + chain(2)
    write = commit + payload.tobytes()
    acquire = struct.pack("<ddQ", 5.0, 0.0, 0) + chain(2)
    acquire_waiting = struct.pack("<ddQ", -1.0, 1.0, 1) + chain(3)
    ops = {
        "match": [(1, chain(3))],
        "lookup": [(2, u64(1) + chain(3))],
        "residency": [(3, chain(2))],
        "acquire": [(4, acquire), (4, acquire_waiting)],
        "put_load": [(6, reserve), (11, write), (4, acquire), (10, struct.pack("<QQQ", 3, 0, 2))],
        "read_release": [
            (6, reserve), (7, commit), (4, acquire), (10, struct.pack("<QQQ", 3, 1, 1)),
            (5, u64(2) + u64(3) + u64(9)),
        ],
        "commit_acked": [(6, reserve), (7, struct.pack("<QQQ", 2, 1, 2) + sums + chain(2))],
        "write_acked": [(6, reserve), (11, struct.pack("<QQQ", 2, 1, 2) + write[24:])],
        "write_stale": [(11, write)],
        "abort": [(6, reserve), (8, u64(2)), (6, reserve)],
        "wait_for": [(9, struct.pack("<dQ", 0.5, 2) + chain(2))],
        "reserve_later": [(6, struct.pack("<d", 0.1) + chain(2, 5))],
        "map": [(12, u64(0)), (12, u64(1))],
        "ping_call": [(13, b"ping"), (34, b"call"), (14, u64(7))],
        "greetings": [(32, b""), (33, b"")],
    }  # fmt: skip
    inputs: dict[str, bytes] = {}
    for name, frames in ops.items():
        stream = b"".join(frame(op, body) for op, body in frames)
        records = b"".join(record(op, body) for op, body in frames)
        inputs[name] = bytes([GREETED, 0]) + stream
        inputs[f"{name}_records"] = bytes([GREETED | RECORDS, 3]) + records
    inputs["slow"] = bytes([GREETED, 129]) + inputs["put_load"][2:]
    inputs["no_namespace"] = bytes([GREETED | NO_NAMESPACE, 0]) + inputs["match"][2:]
    inputs["refused_call"] = bytes([GREETED | REFUSING, 0]) + inputs["ping_call"][2:]
    inputs["not_admitted"] = bytes([0, 0]) + frame(1, chain(1))
    inputs["hello_auth"] = bytes([0, 0]) + frame(33, b"a") + frame(32, b"b") + frame(13, b"c")
    inputs["foreign"] = bytes([0, 0]) + b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    inputs["too_long"] = bytes([GREETED, 0]) + frame(1, length=0xFFFFFFFF)
    inputs["other_magic"] = bytes([GREETED, 0]) + frame(13, magic=b"KVS1")
    inputs["half"] = bytes([GREETED, 0]) + frame(11, write)[:-100]
    return inputs


def main() -> None:
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/fuzz/corpus/frame")
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in sessions().items():
        (directory / name).write_bytes(data)


if __name__ == "__main__":
    main()
