"""Write the seed corpus of csrc/fuzz/bulk_fuzz.cc: a short session for each operation and end.

    python tests/fuzz/make_bulk_corpus.py [directory]

An input is a byte of options and records or a stream; see the harness. The files are kept in the
repository, so this runs only when the protocol changes.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np

from kvstore import _native

RECORDS, CLIENT, GREETED, WRITES, SUMS = 1, 2, 4, 4, 8
HELLO, PROOF, INFO, READ, WRITE = 64, 65, 66, 67, 68
OK, DAMAGED, REFUSED = 0, 1, 2
LENGTHS = (1, 64, 0, 241, 300)  # of the harness's batch


def record(op: int, head: bytes, status: int = 0) -> bytes:
    return bytes([op, status, len(head)]) + head


def payload(num_bytes: int) -> bytes:
    """Zeros, in records of three bytes that are passed on as they are."""
    return bytes(-(-num_bytes // 3) * 3)


def request(region: int, ranges: list[tuple[int, int]], sums: list[int] | None = None) -> bytes:
    head = struct.pack("<QII", region, len(ranges), 0 if sums is None else 1)
    for offset, length in ranges:
        head += struct.pack("<QQ", offset, length)
    return head + struct.pack(f"<{len(sums or [])}Q", *(sums or []))


def sealed(op: int, head: bytes, request_id: int = 1) -> bytes:
    covered = struct.pack("<4sBBHII", b"KVS2", op, 0, 0, len(head) + 8, request_id) + head
    return covered + struct.pack("<Q", _native.xxh3(np.frombuffer(covered, np.uint8)))


def seeds() -> dict[str, bytes]:
    zeros = _native.xxh3(np.zeros(90, np.uint8))
    greeted = bytes([RECORDS | GREETED])
    hello = struct.pack("<QQ", 1, 7) + bytes(32)
    replies = bytes([OK] * 5)
    return {
        "hello": bytes([RECORDS]) + record(HELLO, hello) + record(PROOF, bytes(32)),
        "hello-raw": bytes([0]) + sealed(HELLO, hello),
        "info": greeted + record(INFO, bytes(32)),
        "read": greeted + record(READ, request(1, [(0, 600), (599, 1), (600, 1)])) * 2,
        "read-unknown": greeted + record(READ, request(9, [(0, 1)])),
        "write": greeted
        + record(WRITE, request(1, [(0, 90), (100, 90)], [zeros, 5]))
        + payload(180)
        + record(READ, request(1, [(0, 200)])),
        "write-refused": greeted + record(WRITE, request(2, [(0, 30), (500, 60)])) + payload(90),
        "write-raw": bytes([GREETED]) + sealed(WRITE, request(1, [(3, 30)])) + bytes(30),
        "client-read": bytes([RECORDS | CLIENT]) + record(READ, replies) + payload(sum(LENGTHS)),
        "client-read-raw": bytes([CLIENT]) + sealed(READ, replies) + bytes(sum(LENGTHS)),
        "client-read-sums": bytes([RECORDS | CLIENT | SUMS])
        + record(READ, bytes([OK, REFUSED, OK, REFUSED, OK]))
        + payload(301),
        "client-write": bytes([RECORDS | CLIENT | WRITES])
        + record(WRITE, bytes([OK, DAMAGED, REFUSED, OK, OK])),
    }


def main() -> None:
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/fuzz/corpus/bulk")
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        (directory / f"seed-{name}").write_bytes(data)


if __name__ == "__main__":
    main()
