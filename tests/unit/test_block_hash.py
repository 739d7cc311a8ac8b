"""Block hashes are exactly those of the published algorithms and of the engines' own code.

Proved with committed vectors, and with Hypothesis against oracles that share no code with ours: the
blake3 package, hashlib, pickle and cbor2, put together in tests/vectors/make_block_hash.py. Every
comparison runs on each variant of the native code, down to plain C++.
"""

import array
import hashlib
import importlib.util
import json
import pickle
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import blake3
import cbor2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import _native
from kvstore.block import CHAIN_ALGORITHMS, BlockHashes
from kvstore.hashing import PrefixHasher, hash_blocks

VECTORS = Path(__file__).parents[1] / "vectors"
OURS = ("blake3", "sha256")
VLLM = ("vllm_sha256", "vllm_sha256_cbor")

token_id = st.one_of(
    st.integers(0, 2**32 - 1),
    st.integers(0, 200_000),
    st.sampled_from([0, 23, 24, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1]),
)
names = st.sampled_from(["lora", "mm", "a", "", "x" * 300, "é\0"]) | st.text(max_size=5)
vllm_atom = st.none() | names | st.binary(max_size=40) | st.integers(-(2**63), 2**63)
vllm_keys = st.lists(
    st.tuples(names, vllm_atom) | st.tuples(names, vllm_atom, vllm_atom), min_size=1, max_size=4
).map(tuple)


def _load_oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make", VECTORS / "make_block_hash.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ORACLE = _load_oracle()


@pytest.fixture(params=[0, 1, 2], ids=["portable", "vector", "best"], scope="module")
def simd(request: pytest.FixtureRequest) -> Iterator[int]:
    _native.set_hash_simd_limit(request.param)
    yield request.param
    _native.set_hash_simd_limit(2)


def from_json(extra: Any) -> Any:
    if isinstance(extra, dict):
        return bytes.fromhex(extra["hex"])
    return tuple(map(from_json, extra)) if isinstance(extra, list) else extra


def vectors() -> list[Any]:
    cases = json.loads((VECTORS / "block_hash.json").read_text())
    return [pytest.param(c, id=f"{c['algorithm']}: {c['name']}") for c in cases]


def shared(extra: Any, pool: dict[str, str]) -> Any:
    """`extra` with equal strings made one object, as the pickler tells these from equal ones."""
    if isinstance(extra, tuple):
        return tuple(shared(item, pool) for item in extra)
    return pool.setdefault(extra, extra) if isinstance(extra, str) else extra


@pytest.mark.parametrize("case", vectors())
def test_hashes_equal_the_committed_vectors(simd: int, case: dict[str, Any]) -> None:
    extras = case["extra_keys"]
    if extras is not None:
        # As in the generator, where a repeated name is one object.
        extras = [shared(from_json(extra), {}) for extra in extras]
    hashes = hash_blocks(
        case["token_ids"], case["block_tokens"], extra_keys=extras, algorithm=case["algorithm"]
    )
    assert hashes.hex() == case["hashes"]


def test_the_generator_still_makes_the_committed_vectors() -> None:
    assert (VECTORS / "block_hash.json").read_text() == ORACLE.render(ORACLE.cases())


@pytest.mark.parametrize(
    "size", [0, 1, 55, 56, 63, 64, 65, 127, 128, 1023, 1024, 1025, 2048, 2049, 3073, 9000, 65_537]
)
def test_hash_functions_equal_the_packages_at_length(simd: int, size: int) -> None:
    data = bytes(i * 7 % 251 for i in range(size))
    key = hashlib.sha256(data).digest()
    assert _native.sha256(data) == key
    assert _native.blake3(data) == blake3.blake3(data).digest()
    assert _native.blake3(data, key) == blake3.blake3(data, key=key).digest()


@settings(deadline=None)
@given(data=st.binary(max_size=5000), key=st.binary(min_size=32, max_size=32))
def test_hash_functions_equal_the_packages(simd: int, data: bytes, key: bytes) -> None:
    assert _native.sha256(data) == hashlib.sha256(data).digest()
    assert _native.blake3(data) == blake3.blake3(data).digest()
    assert _native.blake3(data, key) == blake3.blake3(data, key=key).digest()


def test_roots_are_those_of_the_engines() -> None:
    assert _native.hash_chain_root("blake3") == ORACLE.BLAKE3_ROOT
    seed = "vllm-none-hash"
    pickled = hashlib.sha256(pickle.dumps(seed, protocol=pickle.HIGHEST_PROTOCOL)).digest()
    assert _native.hash_chain_root("vllm_sha256") == pickled
    cbor = hashlib.sha256(cbor2.dumps(seed, canonical=True)).digest()
    assert _native.hash_chain_root("vllm_sha256_cbor") == cbor


@settings(deadline=None)
@given(
    tokens=st.lists(token_id, max_size=150),
    block_tokens=st.integers(1, 40),
    algorithm=st.sampled_from(CHAIN_ALGORITHMS),
    parent=st.none() | st.binary(min_size=32, max_size=32),
)
def test_chain_equals_oracle(
    simd: int, tokens: list[int], block_tokens: int, algorithm: str, parent: bytes | None
) -> None:
    hashes = hash_blocks(tokens, block_tokens, parent=parent, algorithm=algorithm)
    assert list(hashes) == ORACLE.chain(algorithm, tokens, block_tokens, None, parent)


@settings(deadline=None)
@given(data=st.data(), block_tokens=st.integers(1, 40), algorithm=st.sampled_from(OURS))
def test_chain_with_extra_keys_equals_oracle(
    simd: int, data: st.DataObject, block_tokens: int, algorithm: str
) -> None:
    tokens = data.draw(st.lists(token_id, max_size=100))
    count = len(tokens) // block_tokens
    extras = data.draw(
        st.lists(st.none() | st.binary(max_size=200), min_size=count, max_size=count)
    )
    hashes = hash_blocks(tokens, block_tokens, extra_keys=extras, algorithm=algorithm)
    assert list(hashes) == ORACLE.chain(algorithm, tokens, block_tokens, extras)


@settings(deadline=None)
@given(data=st.data(), block_tokens=st.integers(1, 40), algorithm=st.sampled_from(VLLM))
def test_vllm_chain_with_extra_keys_equals_pickle_and_cbor2(
    data: st.DataObject, block_tokens: int, algorithm: str
) -> None:
    tokens = data.draw(st.lists(token_id, max_size=100))
    count = len(tokens) // block_tokens
    extras = data.draw(st.lists(st.none() | vllm_keys, min_size=count, max_size=count))
    if data.draw(st.booleans()):
        extras = shared(tuple(extras), {})
    hashes = hash_blocks(tokens, block_tokens, extra_keys=extras, algorithm=algorithm)
    assert list(hashes) == ORACLE.chain(algorithm, tokens, block_tokens, list(extras))


@settings(deadline=None)
@given(key=vllm_keys | st.recursive(st.booleans() | vllm_atom, lambda x: st.tuples(x, x)))
def test_cbor_equals_cbor2(key: Any) -> None:
    assert _native.cbor((key,)) == cbor2.dumps((key,), canonical=True)


@pytest.mark.parametrize("number", [2**64 - 1, -(2**64), 2**63, -(2**63) - 1, -1, -24, -25, -257])
def test_cbor_integers_equal_cbor2_at_the_edges(number: int) -> None:
    assert _native.cbor((number,)) == cbor2.dumps((number,), canonical=True)


def test_extra_keys_nested_without_end_are_refused() -> None:
    key: tuple[Any, ...] = ()
    for _ in range(100_000):
        key = (key,)
    for algorithm in VLLM:
        with pytest.raises(RecursionError):
            hash_blocks([1], 1, extra_keys=[key], algorithm=algorithm)


@pytest.mark.parametrize("big", [False, True], ids=["small ids", "large ids"])
@pytest.mark.parametrize("algorithm", VLLM)
def test_vllm_blocks_beyond_one_pickle_frame_equal_oracle(algorithm: str, big: bool) -> None:
    base = 2**32 - 40_000 if big else 0
    for block_tokens in (9_350, 9_351, 9_360, 9_362, 9_363, 13_100, 20_000, 30_000, 33_000):
        tokens = list(range(base, base + block_tokens))
        hashes = hash_blocks(tokens, block_tokens, algorithm=algorithm)
        assert list(hashes) == ORACLE.chain(algorithm, tokens, block_tokens)


@pytest.mark.parametrize(("token", "token_bytes"), [(1, 2), (300, 3), (70_000, 5), (2**32 - 1, 7)])
def test_pickle_frame_splits_where_cpython_splits(token: int, token_bytes: int) -> None:
    first_split = (64 * 1024) // token_bytes
    frames = set()
    for block_tokens in range(first_split - 30, first_split + 10):
        ids = (token,) * block_tokens
        frames.add(pickle.dumps((bytes(32), ids, None), protocol=5).count(b"\x95"))
        hashes = hash_blocks(list(ids), block_tokens, algorithm="vllm_sha256")
        assert list(hashes) == ORACLE.chain("vllm_sha256", list(ids), block_tokens), block_tokens
    assert len(frames) > 1, "the range must have blocks of one frame and of two"


def test_an_extra_key_too_long_for_one_pickle_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="extra_keys"):
        hash_blocks([1], 1, extra_keys=[(("mm", "x" * 70_000, 0),)], algorithm="vllm_sha256")
    with pytest.raises(ValueError, match=r"extra_keys\[0\]"):
        hash_blocks(
            [1] * 9_000, 9_000, extra_keys=[(("mm", "x" * 5_000, 0),)], algorithm="vllm_sha256"
        )


def test_the_longest_accepted_vllm_extra_key_equals_oracle() -> None:
    length = 65_536
    while True:
        key = (("mm", "x" * length, 0),)
        try:
            hashes = hash_blocks([2**32 - 1] * 16, 16, extra_keys=[key], algorithm="vllm_sha256")
        except ValueError:
            length -= 1
            continue
        break
    assert length > 65_000
    assert list(hashes) == ORACLE.chain("vllm_sha256", [2**32 - 1] * 16, 16, [key])


@settings(deadline=None)
@given(
    first=st.tuples(st.lists(token_id, min_size=1, max_size=40), st.none() | st.binary()),
    second=st.tuples(st.lists(token_id, min_size=1, max_size=40), st.none() | st.binary()),
)
def test_message_is_unambiguous(
    first: tuple[list[int], bytes | None], second: tuple[list[int], bytes | None]
) -> None:
    def decode(data: bytes) -> tuple[list[int], bytes | None]:
        extra = None
        if len(data) % 4 == 1:
            length = int.from_bytes(data[-5:-1], "little")
            begin = len(data) - 5 - (length + 3) // 4 * 4
            extra, data = data[begin : begin + length], data[:begin]
        return np.frombuffer(data, "<u4").tolist(), extra

    for tokens, extra in (first, second):
        assert decode(ORACLE.message(tuple(tokens), extra)) == (tokens, extra)


def test_an_extra_key_that_looks_like_tokens_makes_another_hash() -> None:
    words = np.arange(16, dtype="<u4")
    plain = hash_blocks(np.concatenate([words, words]), 32)
    extra = hash_blocks(words, 16, extra_keys=[words.tobytes()])
    assert plain != extra
    assert hash_blocks(words, 16) != hash_blocks(words, 16, extra_keys=[b""])


@settings(deadline=None)
@given(
    tokens=st.lists(token_id, max_size=120),
    cuts=st.lists(st.integers(0, 120), max_size=5),
    block_tokens=st.integers(1, 20),
    algorithm=st.sampled_from(CHAIN_ALGORITHMS),
    salted=st.booleans(),
    as_array=st.booleans(),
)
def test_growing_prompt_equals_whole_prompt(
    tokens: list[int],
    cuts: list[int],
    block_tokens: int,
    algorithm: str,
    salted: bool,
    as_array: bool,
) -> None:
    salt = b"tenant" if salted and algorithm in OURS else None
    whole = hash_blocks(tokens, block_tokens, extra_keys=salt, algorithm=algorithm)
    hasher = PrefixHasher(block_tokens, salt=salt, algorithm=algorithm)
    grown = BlockHashes.chain([])
    by_parent = hash_blocks([], block_tokens, algorithm=algorithm)
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    for begin, end in pairwise(edges):
        piece = np.array(tokens[begin:end], dtype=np.int64) if as_array else tokens[begin:end]
        fresh = hasher.extend(piece)
        assert fresh.start == len(grown)
        grown = grown + fresh
        done = len(by_parent) * block_tokens
        by_parent = by_parent + hash_blocks(
            tokens[done:end], block_tokens, parent=by_parent, extra_keys=salt, algorithm=algorithm
        )
    assert grown == whole == by_parent
    assert (grown.start, grown.parent) == (0, None)
    assert list(hasher.tail) == tokens[len(whole) * block_tokens :]


def test_hasher_takes_extra_keys_for_the_blocks_it_completes() -> None:
    hasher = PrefixHasher(2)
    first = hasher.extend([1, 2, 3], extra_keys=[b"a"])
    second = hasher.extend([4, 5], extra_keys=[None])
    assert first + second == hash_blocks([1, 2, 3, 4, 5], 2, extra_keys=[b"a", None])
    with pytest.raises(ValueError, match="salt"):
        PrefixHasher(2, salt=b"s").extend([1, 2], extra_keys=[b"a"])


def test_hasher_is_unchanged_by_a_call_that_raises() -> None:
    hasher = PrefixHasher(2)
    hasher.extend([1, 2, 3])
    with pytest.raises(ValueError, match="token_ids"):
        hasher.extend([4, 2**32])
    assert hasher.tail == (3,)
    assert hasher.extend([4]) == hash_blocks([1, 2, 3, 4], 2)[1:]


@pytest.mark.parametrize(
    "dtype", ["i1", "u1", "i2", "u2", "<i4", "<u4", "<i8", "<u8", ">i4", ">u8"]
)
@pytest.mark.parametrize("algorithm", CHAIN_ALGORITHMS)
def test_every_integer_dtype_hashes_alike(dtype: str, algorithm: str) -> None:
    tokens = [i * 5 % 128 for i in range(53)]
    expected = hash_blocks(tokens, 16, algorithm=algorithm)
    assert hash_blocks(np.array(tokens, dtype=dtype), 16, algorithm=algorithm) == expected
    strided = np.repeat(np.array(tokens, dtype=dtype), 2)[::2]
    assert hash_blocks(strided, 16, algorithm=algorithm) == expected


def test_other_containers_hash_alike() -> None:
    tokens = list(range(40))
    expected = hash_blocks(tokens, 16)
    unaligned = np.frombuffer(b"\0" + np.array(tokens, "<i8").tobytes(), "<i8", offset=1)
    readonly = np.array(tokens)
    readonly.flags.writeable = False
    for other in (
        tuple(tokens),
        array.array("I", tokens),
        bytes(tokens),
        unaligned,
        readonly,
        [np.int64(token) for token in tokens],
    ):
        assert hash_blocks(other, 16) == expected


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "int16"])
def test_torch_tensors_hash_alike(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(40, dtype=getattr(torch, dtype))
    assert hash_blocks(tensor, 16) == hash_blocks(list(range(40)), 16)


@pytest.mark.parametrize("bad", [-1, 2**32, 2**63, -(2**63), 2**70])
@pytest.mark.parametrize("algorithm", CHAIN_ALGORITHMS)
def test_id_out_of_range_is_named(bad: int, algorithm: str) -> None:
    with pytest.raises(ValueError, match=rf"token_ids\[2\] is {bad}"):
        hash_blocks([0, 1, bad], 1, algorithm=algorithm)
    for dtype in ("i4", "i8", "u8"):
        limits = np.iinfo(dtype)
        if limits.min <= bad <= limits.max:
            with pytest.raises(ValueError, match=rf"token_ids\[2\] is {bad}"):
                hash_blocks(np.array([0, 1, bad], dtype), 1, algorithm=algorithm)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (ValueError, "block_tokens", {"block_tokens": 0}),
        (ValueError, "block_tokens", {"block_tokens": -1}),
        (ValueError, "block_tokens", {"block_tokens": 2**40}),
        (ValueError, "algorithm", {"algorithm": "md5"}),
        (ValueError, "parent", {"parent": b"short"}),
        (ValueError, "parent", {"parent": BlockHashes.of([])}),
        (TypeError, "parent", {"parent": "root"}),
        (TypeError, "token_ids", {"token_ids": np.zeros(4)}),
        (TypeError, "token_ids", {"token_ids": np.zeros(4, bool)}),
        (TypeError, "token_ids", {"token_ids": [1, 2.0]}),
        (TypeError, "token_ids", {"token_ids": [1, None]}),
        (TypeError, "token_ids", {"token_ids": 7}),
        (ValueError, "token_ids", {"token_ids": np.zeros((2, 2), int)}),
        (ValueError, "extra_keys", {"extra_keys": [b"a"]}),
        (ValueError, "extra_keys", {"extra_keys": [None] * 3}),
        (TypeError, "extra_keys", {"extra_keys": ["a", None]}),
        (TypeError, "extra_keys", {"extra_keys": b"salt", "algorithm": "vllm_sha256"}),
        (TypeError, "extra_keys", {"extra_keys": ["a", None], "algorithm": "vllm_sha256"}),
        (TypeError, "extra_keys", {"extra_keys": [(1.5,), None], "algorithm": "vllm_sha256"}),
        (ValueError, "extra_keys", {"extra_keys": [(2**64,), None], "algorithm": "vllm_sha256"}),
        (ValueError, "extra_keys", {"extra_keys": [(-(2**65),), None], "algorithm": VLLM[1]}),
    ],
)
def test_bad_argument_is_named(
    error: type[Exception], name: str, arguments: dict[str, Any]
) -> None:
    call: dict[str, Any] = {"token_ids": [1, 2, 3, 4], "block_tokens": 2, **arguments}
    with pytest.raises(error, match=name):
        hash_blocks(call.pop("token_ids"), call.pop("block_tokens"), **call)


def test_result_knows_its_place() -> None:
    whole = hash_blocks(range_tokens(64), 16)
    assert (whole.start, whole.parent, len(whole)) == (0, None, 4)
    more = hash_blocks(range_tokens(16), 16, parent=whole)
    assert (more.start, more.parent) == (4, whole[3])
    unknown = hash_blocks(range_tokens(16), 16, parent=whole[3])
    assert unknown == more
    assert (unknown.start, unknown.parent) == (-1, whole[3])
    assert not whole.array.flags.writeable


def test_a_seed_of_ones_own_is_the_root_of_a_chain() -> None:
    seed = hashlib.sha256(pickle.dumps("my seed", protocol=5)).digest()
    root = BlockHashes.chain([], parent=seed)
    hashes = hash_blocks(range_tokens(40), 16, parent=root, algorithm="vllm_sha256")
    assert hashes.start == 0
    assert list(hashes) == ORACLE.chain("vllm_sha256", range_tokens(40), 16, None, seed)


def test_salt_enters_block_0_of_the_chain_only() -> None:
    tokens = range_tokens(64)
    salted = hash_blocks(tokens, 16, extra_keys=b"tenant")
    assert list(salted) == ORACLE.chain("blake3", tokens, 16, [b"tenant", None, None, None])
    assert not set(salted) & set(hash_blocks(tokens, 16))
    rest = hash_blocks(tokens[16:], 16, parent=salted[:1], extra_keys=b"tenant")
    assert rest == salted[1:]


def test_threads_hash_the_same_tokens_alike() -> None:
    tokens = np.arange(16 * 2000, dtype=np.int32)
    expected = hash_blocks(tokens, 16)
    found: list[BlockHashes] = []
    threads = [
        threading.Thread(target=lambda: found.append(hash_blocks(tokens, 16))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def range_tokens(count: int) -> list[int]:
    return list(range(count))
