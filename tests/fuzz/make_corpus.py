"""Writes the seeds of the corpus: valid inputs of each format, from the code that writes them.

Run as `python -m tests.fuzz.make_corpus` after a format changed. Inputs that a fuzzer found and
that are worth keeping lie beside them under names of their own and are left alone.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from kvstore import BlockSpec, Namespace, hash_blocks, wire
from kvstore.tiers import ssd_format
from tests.fuzz.targets import BLOCK_BYTES, SEGMENT, UUID

CORPUS = Path(__file__).parent / "corpus"
_SEALED, _AS_IT_IS = b"\xff", b"\x00"


def _segment() -> bytes:
    rng = np.random.default_rng(1)
    descriptors = np.zeros(3, ssd_format.DESCRIPTOR)
    descriptors["hash"] = rng.integers(0, 256, (3, 32))
    descriptors["depth"] = [1, 2, 3]
    descriptors["parent"][1:] = descriptors["hash"][:-1]
    descriptors["page"] = [2, 4, 6]
    descriptors["stored_bytes"] = descriptors["raw_bytes"] = BLOCK_BYTES
    summary = ssd_format.encode_summary(UUID, SEGMENT, 1, 1, descriptors)
    header = ssd_format.encode_header(UUID, SEGMENT, 16 * ssd_format.PAGE_BYTES)
    return header + summary.tobytes()


def _index() -> bytes:
    rows = np.zeros(4, ssd_format.RECORD)
    for i in range(4):
        rows["hash"][i] = i + 1
        rows["parent"][i] = i
        rows["depth"][i] = i + 1
    rows["segment"], rows["page"] = SEGMENT, [1, 3, 5, 7]
    rows["stored_bytes"] = rows["raw_bytes"] = BLOCK_BYTES
    return ssd_format.seal_records(rows).tobytes()


def _superblocks(directory: Path) -> list[bytes]:
    path = directory / "x"
    ssd_format.write_superblock(path, UUID)
    superblock = path.read_bytes()
    path.unlink()
    namespace = Namespace("model", BlockSpec(2, 2, 64, 16, "bfloat16"))
    return [superblock, namespace.canonical()]


def _messages() -> list[bytes]:
    namespace = Namespace("model", BlockSpec(2, 2, 64, 16, "bfloat16"))
    chain = wire.pack_chain(hash_blocks(list(range(64)), 16))
    messages = [
        wire.Hello(wire.VERSION, namespace.describe(), tenant="a", nonce=bytes(32)),
        wire.Challenge(bytes(32), bytes(32)),
        wire.Auth(bytes(32)),
        wire.Describe(chain),
        wire.Prefetch(chain, 1.0),
        wire.Corrupt(bytes(32)),
        wire.AdminShutdown(True),
    ]
    bodies = [
        struct.pack("<ddQ", 1.0, 1.0, 0) + chain,  # ACQUIRE
        struct.pack("<QQQ", 1, 0, 2) + bytes(16) + chain,  # COMMIT
        wire.pack_u64(7),
        chain,
    ]
    return [wire.encode(message) for message in messages] + bodies


def seeds(directory: Path) -> dict[str, list[bytes]]:
    return {
        "segment": [_AS_IT_IS + _segment(), _SEALED + _segment()],
        "index": [_AS_IT_IS + _index(), _SEALED + _index()],
        "superblock": _superblocks(directory),
        "config": [
            b'cpu = "8GiB"\nssd = "/var/cache/kv"\nverify = "always"\n',
            b"threads = 4\nlease_seconds = 2.5\nhuge_pages = true\n",
        ],
        "messages": _messages(),
    }


def main() -> None:
    CORPUS.mkdir(exist_ok=True)
    for name, inputs in seeds(CORPUS).items():
        (CORPUS / name).mkdir(exist_ok=True)
        for i, data in enumerate(inputs):
            (CORPUS / name / f"seed-{i}").write_bytes(data)


if __name__ == "__main__":
    main()
