"""The kept corpus of every fuzzed parser runs through it in the default suite.

Proved: no input that a fuzzer once found makes a parser fail again, and each seed, a valid input,
is taken. The fuzzers themselves run by `make fuzz`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_kept_inputs_are_taken_or_refused_with_an_error_of_ours(name: str) -> None:
    kept = sorted((CORPUS / name).iterdir())
    assert kept, f"{name} has no corpus"
    for path in kept:
        TARGETS[name](path.read_bytes())


@pytest.mark.parametrize("name", sorted(TARGETS))
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_damaged_seeds_are_taken_or_refused_with_an_error_of_ours(
    name: str, data: st.DataObject
) -> None:
    seeds = [path.read_bytes() for path in sorted((CORPUS / name).glob("seed-*"))]
    raw = bytearray(data.draw(st.sampled_from(seeds)))
    for _ in range(data.draw(st.integers(0, 4))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    TARGETS[name](bytes(raw[: data.draw(st.integers(0, len(raw)))]))
