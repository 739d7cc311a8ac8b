"""Makes block_hash.json: `python tests/vectors/make_block_hash.py > tests/vectors/block_hash.json`.

Nothing of kvstore runs here. The oracles are the blake3 and cbor2 packages, hashlib and pickle, put
together as csrc/core/block_hash.h says (blake3, sha256) and as vLLM 0.32 does (the vllm_ chains).
"""

import hashlib
import json
import pickle
import random
import struct
import sys
from typing import Any

import blake3
import cbor2

BLAKE3_ROOT = blake3.blake3(b"kvstore block hash chain 1").digest()


def message(tokens: tuple[int, ...], extra: bytes | None) -> bytes:
    data = struct.pack(f"<{len(tokens)}I", *tokens)
    if extra is not None:
        padding = bytes(-len(extra) % 4)
        data += extra + padding + struct.pack("<I", len(extra)) + b"\x01"
    return data


def vllm_hash(algorithm: str, value: Any) -> bytes:
    if algorithm == "vllm_sha256":
        data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    else:
        data = cbor2.dumps(value, canonical=True)
    return hashlib.sha256(data).digest()


def block_hash(algorithm: str, parent: bytes | None, tokens: tuple[int, ...], extra: Any) -> bytes:
    if algorithm == "blake3":
        return blake3.blake3(message(tokens, extra), key=parent or BLAKE3_ROOT).digest()
    if algorithm == "sha256":
        return hashlib.sha256((parent or b"") + message(tokens, extra)).digest()
    before = parent or vllm_hash(algorithm, "vllm-none-hash")
    return vllm_hash(algorithm, (before, tokens, extra))


def chain(
    algorithm: str,
    tokens: list[int],
    block_tokens: int,
    extras: list[Any] | None = None,
    parent: bytes | None = None,
) -> list[bytes]:
    hashes = []
    for block in range(len(tokens) // block_tokens):
        ids = tuple(tokens[block * block_tokens : (block + 1) * block_tokens])
        parent = block_hash(algorithm, parent, ids, extras[block] if extras else None)
        hashes.append(parent)
    return hashes


def as_json(extra: Any) -> Any:
    """Tuples as lists and bytes as {"hex": ...}."""
    if isinstance(extra, bytes):
        return {"hex": extra.hex()}
    return [as_json(item) for item in extra] if isinstance(extra, tuple) else extra


def cases() -> list[dict[str, Any]]:
    rng = random.Random(20251)
    edges = [0, 1, 23, 24, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1]
    prompts = [
        ("edges", 4, edges * 2),
        ("one token a block", 1, edges),
        ("three tokens a block", 3, edges),
        ("sixteen", 16, [rng.randrange(150_000) for _ in range(16 * 4 + 5)]),
        ("several chunks", 700, [rng.randrange(2**32) for _ in range(1400)]),
    ]
    raw: list[Any] = [None, b"", b"salt", bytes(range(64))]
    repeated = "adapter"
    tuples: list[Any] = [
        (("lora", repeated, repeated), ("cache_salt", "tenant é")),
        None,
        (("mm", "image-1", -5), ("mm", "image-2", 70_000)),
        (("prompt_embeds", hashlib.sha256(b"embeds").digest()), None, 2**40, ()),
    ]
    found: list[tuple[str, str, int, list[int], list[Any] | None]] = []
    for algorithm in ("blake3", "sha256", "vllm_sha256", "vllm_sha256_cbor"):
        extras: list[Any] = tuples if algorithm.startswith("vllm") else raw
        for name, block_tokens, tokens in prompts:
            found.append((name, algorithm, block_tokens, tokens, None))
        found.append(("extra keys", algorithm, 16, prompts[3][2], extras))
    return [
        {
            "name": name,
            "algorithm": algorithm,
            "block_tokens": block_tokens,
            "token_ids": tokens,
            "extra_keys": None if extras is None else [as_json(extra) for extra in extras],
            "hashes": [value.hex() for value in chain(algorithm, tokens, block_tokens, extras)],
        }
        for name, algorithm, block_tokens, tokens, extras in found
    ]


def render(vectors: list[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(vector) for vector in vectors) + "\n]\n"


if __name__ == "__main__":
    sys.stdout.write(render(cases()))
