"""Parsers of what comes over the socket: what was packed comes back, what a stranger sends is
either read or refused by one error. Hypothesis makes the bytes."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import errors, wire
from kvstore.block import BlockHashes

chains = st.builds(
    lambda count, start, parent, seed: (
        BlockHashes.of(_hashes(count, seed))
        if start < 0
        else BlockHashes.chain(_hashes(count, seed), start, parent if start else None)
    ),
    st.integers(0, 9),
    st.integers(-1, 1 << 40),
    st.binary(min_size=32, max_size=32),
    st.integers(0, 255),
)


def _hashes(count: int, seed: int) -> np.ndarray:
    return np.full((count, 32), seed, np.uint8)


@given(chains)
def test_a_chain_comes_back(chain: BlockHashes) -> None:
    packed = wire.pack_chain(chain)
    assert len(packed) == 48 + 32 * len(chain)
    back = wire.parse_chain(b"xyz" + packed + b"!", 3, 1)
    assert back == chain
    assert (back.start, back.parent) == (chain.start, chain.parent)


@given(chains, st.floats(-1, 1e6), st.floats(0, 1e6), st.integers(0, 1))
def test_an_acquire_comes_back(chain: BlockHashes, ttl: float, wait: float, flags: int) -> None:
    body = struct.pack("<ddQ", ttl, wait, flags) + wire.pack_chain(chain)
    request = wire.parse_acquire(body)
    assert request == (None if ttl < 0 else ttl, wait, bool(flags), chain)


@given(chains, st.integers(0, (1 << 64) - 1), st.integers(0, 2), st.integers(0, 9))
def test_a_commit_comes_back(chain: BlockHashes, reservation: int, ack: int, count: int) -> None:
    sums = np.arange(count, dtype=np.uint64)
    head = struct.pack("<QQQ", reservation, ack, count) + sums.tobytes()
    request = wire.parse_commit(head + wire.pack_chain(chain))
    assert (request.reservation, request.ack, request.hashes) == (reservation, ack, chain)
    assert request.checksums.tolist() == sums.tolist()


@given(
    st.sampled_from(
        [
            wire.parse_chain,
            wire.parse_acquire,
            wire.parse_commit,
            wire.parse_quiesced,
            wire.decode_hello,
            wire.decode_greeting,
            wire.decode_auth,
            wire.decode_call,
            wire.decode_value,
        ]
    ),
    st.binary(max_size=200),
)
def test_a_strangers_bytes_are_read_or_refused_by_one_error(
    parse: Callable[[bytes], Any], body: bytes
) -> None:
    with contextlib.suppress(errors.IncompatibleError):
        parse(body)


@given(chains, st.data())
def test_a_cut_or_longer_chain_is_refused(chain: BlockHashes, data: st.DataObject) -> None:
    packed = wire.pack_chain(chain)
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(errors.IncompatibleError):
        wire.parse_chain(packed[:cut])
    with pytest.raises(errors.IncompatibleError):
        wire.parse_chain(packed + b"\0")


def test_every_error_of_the_library_has_a_status_and_its_name() -> None:
    for name in wire.ERRORS[:10]:
        kind = getattr(errors, name)
        assert wire.ERRORS[wire.status_of(kind("why")) - 1] == name
    assert wire.ERRORS[wire.status_of(KeyError("x")) - 1] == "KeyError"
    assert wire.ERRORS[wire.status_of(FileNotFoundError(2, "x")) - 1] == "KVStoreError"


def test_messages_come_back_and_unknown_fields_are_refused() -> None:
    hello = wire.Hello(wire.VERSION, {"model": "m"}, b"t", "tenant", b"n" * 32)
    assert wire.decode_hello(wire.encode(hello)) == hello
    call = wire.Prefetch(b"chain", 0.5)
    assert wire.decode_call(wire.encode(call)) == call
    for body in ({"is": "hello", "version": 2, "namespace": {}, "more": 1}, {"is": "nope"}):
        with pytest.raises(errors.IncompatibleError):
            wire.decode_hello(wire.encode(body))
