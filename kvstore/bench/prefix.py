"""Hashing a prompt, finding its longest prefix, and what the index costs with many blocks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

import kvstore
from kvstore import _native
from kvstore.bench.report import Figure
from kvstore.bench.timing import Scale, in_turn, median, speedup
from kvstore.block import BlockHashes, BlockSpec
from kvstore.store import Store

Tokens = npt.NDArray[np.int32]
Hashes = npt.NDArray[np.uint8]

PROMPT_TOKENS = 131_072
BLOCK_TOKENS = 16
PROMPT_BLOCKS = PROMPT_TOKENS // BLOCK_TOKENS
SPEC = BlockSpec(num_layers=1, num_kv_heads=1, head_dim=16, block_tokens=BLOCK_TOKENS, dtype="int8")
HASHLIB = "chain of hashlib's sha256 in Python"
DICT = "dict in Python, block by block"
HASHLIB_AND_DICT = "hashlib's sha256 and a dict in Python"


def _chain_in_python(tokens: Tokens) -> list[bytes]:
    text, step = tokens.tobytes(), BLOCK_TOKENS * tokens.itemsize
    sha256, parent, chain = hashlib.sha256, bytes(32), []
    for at in range(0, len(text), step):
        parent = sha256(parent + text[at : at + step]).digest()
        chain.append(parent)
    return chain


def _match_in_python(known: dict[bytes, int], chain: list[bytes]) -> int:
    for count, block_hash in enumerate(chain):
        if block_hash not in known:
            return count
    return len(chain)


def hashing(scale: Scale) -> list[Figure]:
    """A prompt of 131,072 tokens in blocks of 16, from an int32 array."""
    random = np.random.default_rng(0)
    rounds = scale.pick(100, 5)
    prompts = [random.integers(0, 150_000, PROMPT_TOKENS, np.int32) for _ in range(8)]

    def by(algorithm: str) -> Callable[[int], object]:
        return lambda number: kvstore.hash_blocks(
            prompts[number % 8], BLOCK_TOKENS, algorithm=algorithm
        )

    taken = in_turn(
        {
            "hash_128k_ms": by("blake3"),
            "hash_128k_sha256_ms": by("sha256"),
            "hash_128k_vllm_sha256_cbor_ms": by("vllm_sha256_cbor"),
            HASHLIB: lambda number: _chain_in_python(prompts[number % 8]),
        },
        rounds,
    )
    theirs = taken.pop(HASHLIB)
    return [
        Figure(name, median(seconds) * 1e3, "ms", speedup(seconds, theirs), HASHLIB)
        for name, seconds in taken.items()
    ]


def _fill(store: Store, chain: BlockHashes) -> None:
    blocks = kvstore.ContiguousBlocks(np.zeros((len(chain), SPEC.block_bytes), np.uint8))
    assert store.put(chain, blocks).wait().num_stored == len(chain)


def matching(scale: Scale) -> list[Figure]:
    """The longest prefix of 8,192 hashes in a store, by how much of the prompt is resident.

    `match_8192_ms` is the slowest residency of none, all and 14 between, which the search does not
    know beforehand. `unlinked` is for hashes that came without their chain: no jumps are possible.
    """
    random = np.random.default_rng(0)
    rounds = scale.pick(200, 10)
    prompt = random.integers(0, 150_000, PROMPT_TOKENS, np.int32)
    resident = kvstore.hash_blocks(prompt, BLOCK_TOKENS)
    shares = [0, PROMPT_BLOCKS, *random.integers(1, PROMPT_BLOCKS, 14).tolist()]
    prompts = []
    for blocks in shares:
        other = random.integers(0, 150_000, PROMPT_TOKENS, np.int32)
        other[: blocks * BLOCK_TOKENS] = prompt[: blocks * BLOCK_TOKENS]
        prompts.append(other)
    chains = [kvstore.hash_blocks(tokens, BLOCK_TOKENS) for tokens in prompts]
    known = dict.fromkeys(_chain_in_python(prompt), 0)
    chain_in_python = _chain_in_python(prompt)
    # A slot takes a page; one chunk of the arena is more than the blocks and their headers need.
    with kvstore.open(SPEC, cpu=3 * PROMPT_BLOCKS * 4096, threads=1) as store:
        _fill(store, resident)
        unlinked = BlockHashes.of(resident.array)
        assert [store.match(chain) for chain in chains] == shares
        assert store.match(unlinked) == PROMPT_BLOCKS

        def hash_and_match(number: int) -> None:
            at = number % len(prompts)
            found = store.match(kvstore.hash_blocks(prompts[at], BLOCK_TOKENS))
            assert found == shares[at]

        calls: dict[str, Callable[[int], object]] = {
            f"share {blocks}": (lambda _, chain=chain: store.match(chain))  # type: ignore[misc]
            for blocks, chain in zip(shares, chains, strict=True)
        }
        calls["unlinked"] = lambda _: store.match(unlinked)
        calls["both"] = hash_and_match
        calls[DICT] = lambda _: _match_in_python(known, chain_in_python)
        calls[HASHLIB_AND_DICT] = lambda _: _match_in_python(known, _chain_in_python(prompt))
        taken = in_turn(calls, rounds)
    slowest = max((taken[f"share {blocks}"] for blocks in shares), key=median)
    return [
        Figure(name, median(seconds) * 1e3, "ms", speedup(seconds, taken[against]), against)
        for name, seconds, against in (
            ("match_8192_ms", slowest, DICT),
            ("match_8192_unlinked_ms", taken["unlinked"], DICT),
            ("hash_match_128k_ms", taken["both"], HASHLIB_AND_DICT),
        )
    ]


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _random_hashes(count: int) -> Hashes:
    return np.frombuffer(np.random.default_rng(0).bytes(count * 32), np.uint8).reshape(-1, 32)


def _filled(hashes: Hashes, chain_blocks: int) -> _native.BlockIndex:
    index = _native.BlockIndex()
    for at in range(0, len(hashes), chain_blocks):
        index.insert_chain(0, hashes[at : at + chain_blocks])
    return index


def index(scale: Scale) -> list[Figure]:
    """What the index holds and costs with 10 million blocks, against 10 thousand.

    `index_lookup_growth` is the cost of a look-up in batches of random resident hashes, as
    `residency` and unlinked matches make them; `index_match_growth` that of a whole longest-prefix
    match (at most 14 look-ups that wait for each other) with half of 1,000 blocks resident.
    """
    many, few, chain_blocks = scale.pick(10_000_000, 1_000_000), 10_000, 1000
    rounds, batch = scale.pick(30, 5), scale.pick(65_536, 16_384)
    hashes = _random_hashes(many)
    before = _resident_bytes()
    large = _filled(hashes, chain_blocks)
    held = max(_resident_bytes() - before, large.memory_bytes)
    small = _filled(hashes[:few], chain_blocks)
    random = np.random.default_rng(1)
    picks = {
        blocks: [hashes[random.integers(0, blocks, batch)] for _ in range(rounds)]
        for blocks in (many, few)
    }
    half, probes = chain_blocks // 2, 50
    chains = {
        blocks: [
            [_half_resident(hashes, start * chain_blocks, half) for start in starts]
            for starts in random.integers(0, blocks // chain_blocks, (rounds, probes)).tolist()
        ]
        for blocks in (many, few)
    }

    def match_all(index: _native.BlockIndex, round_chains: list[Hashes]) -> None:
        for chain in round_chains:
            assert index.match(0, chain, 0) == half

    taken = in_turn(
        {
            "count many": lambda number: large.count(0, picks[many][number]),
            "count few": lambda number: small.count(0, picks[few][number]),
            "match many": lambda number: match_all(large, chains[many][number]),
            "match few": lambda number: match_all(small, chains[few][number]),
        },
        rounds,
    )
    assert large.count(0, picks[many][0]) == batch
    against = f"{few:,} blocks"
    growth = 1 / speedup(taken["count many"], taken["count few"])
    match_growth = 1 / speedup(taken["match many"], taken["match few"])
    return [
        Figure("index_bytes_per_block", held / many, "bytes", 128 * many / held, "128 bytes"),
        Figure("index_lookup_growth", growth, f"x at {many:,} blocks", 1 / growth, against),
        Figure(
            "index_match_growth", match_growth, f"x at {many:,} blocks", 1 / match_growth, against
        ),
        Figure("index_lookup_ns", median(taken["count many"]) / batch * 1e9, "ns"),
    ]


def _half_resident(hashes: Hashes, start: int, half: int) -> Hashes:
    chain = hashes[start : start + 2 * half].copy()
    chain[half:, 0] ^= 1
    return chain
