"""The value types: BlockSpec's sizes, Namespace's identity, BlockHashes' lineage.

Sizes are compared with numpy arrays of the same shape; a namespace's digest must change with every
field and survive a description; slices and sums of BlockHashes are compared with those of a list.
"""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import DTYPE_BYTES, BlockHash, BlockHashes, BlockSpec, Namespace
from kvstore.errors import ConfigError, IncompatibleError

SPEC = BlockSpec(num_layers=3, num_kv_heads=2, head_dim=8, block_tokens=16, dtype="bfloat16")
NAMESPACE = Namespace(model="org/model", revision="abc", spec=SPEC)
HASHES = [bytes([i]) * 32 for i in range(10)]
CHAIN = BlockHashes.chain(HASHES)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_sizes_are_those_of_an_array_of_the_shape(dtype: str) -> None:
    spec = dataclasses.replace(SPEC, dtype=dtype)
    element = {1: np.uint8, 2: np.uint16, 4: np.uint32}[spec.dtype_bytes]
    block = np.empty((3, 2, 16, 2, 8), dtype=element)
    assert spec.num_parts == 2
    assert spec.block_bytes == block.nbytes
    assert spec.layer_bytes == block[0].nbytes
    assert spec.token_bytes == block[:, :, 0].nbytes


def test_latent_block_has_one_part() -> None:
    spec = BlockSpec(4, 1, 576, 64, "bfloat16", kind="latent")
    assert spec.num_parts == 1
    assert spec.block_bytes == 4 * 64 * 576 * 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 0),
        ("num_kv_heads", -1),
        ("head_dim", 2.0),
        ("block_tokens", True),
        ("dtype", "float64"),
        ("dtype", None),
        ("kind", "mamba"),
    ],
)
def test_bad_spec_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{field}:"):
        dataclasses.replace(SPEC, **{field: value})


def test_latent_block_with_heads_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^num_kv_heads:"):
        dataclasses.replace(SPEC, kind="latent")


def test_blocks_of_bytes_have_just_these_bytes() -> None:
    spec = BlockSpec.of_bytes(12_345)
    assert (spec.block_bytes, spec.layer_bytes, spec.num_layers) == (12_345, 12_345, 1)
    for wrong in (0, -1, 1.5, True, "9"):
        with pytest.raises(ConfigError, match=r"^num_bytes:"):
            BlockSpec.of_bytes(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("model", 7),
        ("revision", None),
        ("spec", "big"),
        ("layout", ""),
        ("tp_rank", 1),
        ("tp_rank", -1),
        ("tp_size", 0),
        ("pp_rank", 3),
        ("pp_size", "1"),
        ("lora", b"x"),
        ("salt", "text"),
        ("salt_digest", "not hex"),
        ("hash_algorithm", "md5"),
    ],
)
def test_bad_namespace_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{field}:"):
        dataclasses.replace(NAMESPACE, **{field: value})


VARIANTS: list[dict[str, Any]] = [
    {"model": "org/other"},
    {"revision": "abd"},
    {"spec": dataclasses.replace(SPEC, num_layers=1)},
    {"spec": dataclasses.replace(SPEC, num_kv_heads=1)},
    {"spec": dataclasses.replace(SPEC, head_dim=4)},
    {"spec": dataclasses.replace(SPEC, block_tokens=4)},
    {"spec": dataclasses.replace(SPEC, dtype="float16")},
    {"layout": "vllm-cpu-1"},
    {"tp_size": 2},
    {"tp_rank": 1, "tp_size": 2},
    {"pp_size": 2},
    {"pp_rank": 1, "pp_size": 2},
    {"lora": "adapter"},
    {"salt": b"tenant"},
    {"salt": b"tenant2"},
    {"hash_algorithm": "vllm_sha256"},
    {"hash_algorithm": "sglang_sha256"},
    {"hash_algorithm": "external"},
]


def test_every_field_changes_the_digest() -> None:
    variants = [NAMESPACE, *(dataclasses.replace(NAMESPACE, **change) for change in VARIANTS)]
    assert len({namespace.digest for namespace in variants}) == len(variants)
    assert {len(namespace.digest) for namespace in variants} == {32}


@pytest.mark.parametrize("change", [{}, *VARIANTS])
def test_description_survives_json(change: dict[str, Any]) -> None:
    namespace = dataclasses.replace(NAMESPACE, **change)
    copy = Namespace.from_description(json.loads(json.dumps(namespace.describe())))
    assert copy == namespace
    assert copy.digest == namespace.digest
    assert copy.canonical() == namespace.canonical()


def test_digest_is_stable_across_releases() -> None:
    assert NAMESPACE.digest.hex() == (
        "20ea090ffc41936ef75ffaa281c388ec4dbcad09414da1a23ae8f839f2bba9d7"
    )


def test_salt_is_nowhere_in_clear() -> None:
    namespace = Namespace("m", SPEC, "r", salt=b"correct horse")
    shown = repr(namespace) + str(namespace.describe()) + str(vars(namespace))
    assert "correct horse" not in shown
    assert b"correct horse" not in namespace.canonical()
    with pytest.raises(ConfigError, match=r"^salt_digest:"):
        dataclasses.replace(namespace, salt=b"another")


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 2},
        {"version": None},
        {"colour": "blue"},
        {"spec": None},
        {"spec": {"num_layers": 1}},
    ],
)
def test_foreign_description_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleError):
        Namespace.from_description({**NAMESPACE.describe(), **damage})
    with pytest.raises(IncompatibleError):
        Namespace.from_description(damage)


def test_description_with_a_bad_value_names_it() -> None:
    with pytest.raises(ConfigError, match=r"^tp_size:"):
        Namespace.from_description({**NAMESPACE.describe(), "tp_size": "two"})


def lineage(hashes: BlockHashes) -> tuple[int, bytes | None]:
    return hashes.start, hashes.parent


@given(
    begin=st.none() | st.integers(-12, 12),
    end=st.none() | st.integers(-12, 12),
    step=st.none() | st.integers(-3, 3).filter(bool),
)
def test_slices_are_those_of_a_list_and_keep_the_lineage(
    begin: int | None, end: int | None, step: int | None
) -> None:
    piece = CHAIN[begin:end:step]
    assert list(piece) == HASHES[begin:end:step]
    assert piece.array.flags.c_contiguous
    assert not piece.array.flags.writeable
    if step in (None, 1):
        first = slice(begin, end).indices(10)[0]
        assert lineage(piece) == (first, HASHES[first - 1] if first else None)
    else:
        assert lineage(piece) == (-1, None)


@given(first=st.integers(0, 10), second=st.integers(0, 10))
def test_adjacent_pieces_add_up(first: int, second: int) -> None:
    first, second = sorted((first, second))
    total = CHAIN[:first] + CHAIN[first:second] + CHAIN[second:]
    assert total == CHAIN
    assert lineage(total) == lineage(CHAIN)
    assert lineage(CHAIN[:first].after()) == lineage(CHAIN[first:])


def test_pieces_that_do_not_follow_do_not_add() -> None:
    other = BlockHashes.chain(HASHES[4:5], start=3, parent=HASHES[9])
    for left, right in (
        (CHAIN[:3], CHAIN[4:]),
        (CHAIN[3:], CHAIN[:3]),
        (CHAIN[:3], other),
        (CHAIN[:3], BlockHashes.of(HASHES[3:])),
        (BlockHashes.of(HASHES[:3]), CHAIN[3:]),
    ):
        with pytest.raises(ValueError, match="follow"):
            left + right
    assert BlockHashes.of(HASHES[:3]) + BlockHashes.of(HASHES[5:]) == BlockHashes.of(
        HASHES[:3] + HASHES[5:]
    )


def test_reading_is_that_of_a_list() -> None:
    assert len(CHAIN) == 10
    assert list(CHAIN) == HASHES
    assert CHAIN[3] == HASHES[3]
    assert CHAIN[-1] == CHAIN.last == HASHES[-1]
    assert BlockHash(HASHES[4]) in CHAIN
    assert CHAIN.hex() == [block_hash.hex() for block_hash in HASHES]
    with pytest.raises(IndexError):
        CHAIN[10]
    assert BlockHash(HASHES[0]) == HASHES[0]


def test_raw_hashes_are_unlinked() -> None:
    array = np.frombuffer(b"".join(HASHES), np.uint8).reshape(-1, 32)
    for raw in (HASHES, tuple(HASHES), array, array.copy(), list(CHAIN)):
        hashes = BlockHashes.of(raw)
        assert hashes == CHAIN
        assert not hashes.linked
        assert not hashes.array.flags.writeable
        assert lineage(hashes[2:]) == (-1, HASHES[1])
    assert BlockHashes.of(CHAIN) is CHAIN
    assert len(BlockHashes.of([])) == 0


def test_later_writes_to_the_callers_array_do_not_reach_the_hashes() -> None:
    array = np.zeros((2, 32), np.uint8)
    hashes = BlockHashes.of(array)
    array[:] = 1
    assert hashes[0] == bytes(32)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([bytes(32), bytes(31)], r"hashes\[1\]"),
        (bytes(64), "hashes:"),
        (np.zeros((2, 31), np.uint8), "hashes:"),
        (np.zeros((2, 32), np.int8), "hashes:"),
        (np.zeros(32, np.uint8), "hashes:"),
    ],
)
def test_malformed_hashes_are_refused(raw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockHashes.of(raw)


def test_chain_needs_a_sound_place() -> None:
    with pytest.raises(ValueError, match="start"):
        BlockHashes.chain(HASHES, start=-1)
    with pytest.raises(ValueError, match="parent"):
        BlockHashes.chain(HASHES, start=3)
    with pytest.raises(ValueError, match="parent"):
        BlockHashes.chain(HASHES, start=3, parent=b"short")
    linked = BlockHashes.chain(BlockHashes.of(HASHES[3:]), start=3, parent=HASHES[2])
    assert CHAIN[:3] + linked == CHAIN


def test_hashes_are_compared_not_lineages() -> None:
    assert BlockHashes.of(HASHES) == CHAIN
    assert CHAIN[:5] != CHAIN[:6]
    assert CHAIN != HASHES
    with pytest.raises(TypeError):
        hash(CHAIN)
