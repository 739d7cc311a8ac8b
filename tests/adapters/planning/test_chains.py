"""Chain: hashes are appended only, blocks of coarser groups are named by their last hash, and
slices that were handed out do not change while the chain grows."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import ConfigError
from kvstore_adapters.planning.chains import Chain
from kvstore_adapters.planning.groups import Group

HASHES = [hashlib.sha256(bytes([i])).digest() for i in range(200)]
FINE, COARSE = Group(0, 16, "full"), Group(1, 48, "full")
WINDOW = Group(2, 32, "window", 100)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_a_chain_that_grew_in_any_steps_has_the_engines_hashes(lengths: list[int]) -> None:
    chain, slices = Chain(16), []
    for length in sorted(lengths):
        chain.extend(HASHES[:length])
        slices.append((len(chain), chain.blocks(FINE, 0, len(chain))))
    assert len(chain) == max(lengths)
    for length, blocks in slices:
        assert list(blocks) == HASHES[:length]
        assert not blocks.array.flags.writeable


def test_a_coarse_block_is_named_by_its_last_hash_and_knows_the_one_before() -> None:
    chain = Chain(16)
    chain.extend(HASHES[:10])
    assert chain.num_blocks(COARSE) == 3
    blocks = chain.blocks(COARSE, 1, 3)
    assert list(blocks) == [HASHES[5], HASHES[8]]
    assert (blocks.start, blocks.parent) == (1, HASHES[2])
    assert chain.blocks(COARSE, 0, 1).parent is None
    assert blocks.array.flags.c_contiguous
    assert chain.last_of(144) == HASHES[8]


def test_blocks_of_a_window_are_not_linked() -> None:
    chain = Chain(16)
    chain.extend(HASHES[:8])
    blocks = chain.blocks(WINDOW, 2, 4)
    assert list(blocks) == [HASHES[5], HASHES[7]]
    assert not blocks.linked


@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8))
def test_an_engine_that_takes_tokens_back_is_followed(first: int, kept: int, other: int) -> None:
    chain = Chain(16)
    chain.extend(HASHES[:first])
    before = chain.blocks(FINE, 0, first)
    went_on = HASHES[: min(first, kept)] + HASHES[100 : 100 + other]
    chain.extend(went_on)
    assert list(chain.blocks(FINE, 0, len(chain))) == went_on
    assert list(before) == HASHES[:first]


def test_hashes_of_another_length_are_refused_and_none_is_kept() -> None:
    chain = Chain(16)
    with pytest.raises(ConfigError, match="has 16 bytes, not 32"):
        chain.extend([HASHES[0], b"x" * 16])
    assert len(chain) == 0


def test_a_group_whose_blocks_are_no_whole_hashes_is_refused() -> None:
    chain = Chain(16)
    chain.extend(HASHES[:4])
    with pytest.raises(ConfigError, match="group 7"):
        chain.blocks(Group(7, 24, "full"), 0, 1)


def test_blocks_beyond_the_known_hashes_are_refused() -> None:
    chain = Chain(16)
    chain.extend(HASHES[:4])
    with pytest.raises(IndexError):
        chain.blocks(FINE, 2, 5)
