"""The SSD tier against a dict, under writes, forgetting, reclaims, reopening and a lost index.

The model holds what was written under each key. The tier may lose a block only where it says so (a
refused write, a drop by reclaim); it may never return other bytes.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvstore.tiers.ssd import Records, SsdTier
from tests.ssd_support import (
    KINDS,
    contents,
    hash_of,
    hashes_of,
    open_tier,
    payload_of,
    read,
    write,
)

NUMBERS = st.lists(st.integers(0, 60), min_size=1, max_size=40)
# A key's bytes never change, so its size is a function of its number.
SIZES = [1, 4095, 4096, 5000, 20_000]


def size_of(number: int) -> int:
    return SIZES[number % len(SIZES)]


class SsdModel(RuleBasedStateMachine):
    tier: SsdTier

    @initialize(kind=st.sampled_from(KINDS), direct=st.booleans())
    def open_first(self, kind: str, direct: bool) -> None:
        self.settings: dict[str, Any] = {
            "kind": kind,
            "direct": direct,
            "segment_bytes": 128 << 10,
            "capacity_bytes": 640 << 10,
        }
        self.directory = tempfile.mkdtemp(prefix="kvstore-ssd-")
        self.path = Path(self.directory) / "ssd"
        self.tier = open_tier(self.path, **self.settings)
        self.written: set[int] = set()  # ever written: any of these may come back
        self.present: set[int] = set()  # acknowledged and neither forgotten nor dropped

    @rule(numbers=NUMBERS, durable=st.booleans(), shift=st.sampled_from([0, 16]))
    def write(self, numbers: list[int], durable: bool, shift: int) -> None:
        for size in SIZES:
            some = [number for number in numbers if size_of(number) == size]
            if not some:
                continue
            at = write(self.tier, some, size, durable=durable, shift=shift)
            kept = int(at.ok.sum())
            assert at.ok[:kept].all()
            assert kept == len(some) or at.reason == "full"
            self.written |= set(some)
            self.present |= set(some[:kept])
            expected = [payload_of(number, size).tobytes() for number in some[:kept]]
            assert read(self.tier, at, shift)[:kept] == expected

    @rule(numbers=NUMBERS)
    def forget(self, numbers: list[int]) -> None:
        self.tier.forget(np.ones(len(numbers), np.uint32), hashes_of(numbers))
        self.present -= set(numbers)

    @rule(share=st.floats(0, 1), seed=st.integers(0, 99))
    def reclaim(self, share: float, seed: int) -> None:
        def survivors(found: Records) -> np.ndarray[Any, np.dtype[np.bool_]]:
            chosen: np.ndarray[Any, np.dtype[np.bool_]] = (
                np.random.default_rng(seed).random(len(found)) < share
            )
            return chosen

        before = self.tier.used_bytes
        done = self.tier.reclaim(survivors)
        if done is None:
            return
        assert self.tier.used_bytes <= before
        self.present -= {int.from_bytes(h[:8].tobytes(), "big") for h in done.dropped.hash}
        assert None not in read(self.tier, done.moved)

    @rule()
    def reopen(self) -> None:
        self.tier.close()
        self.tier = open_tier(self.path, **self.settings)

    @rule()
    def reopen_without_the_index(self) -> None:
        self.tier.close()
        shutil.rmtree(self.path / "index")
        self.tier = open_tier(self.path, **self.settings)
        # What was forgotten or dropped may be back; nothing may be lost.
        found = {int.from_bytes(key[:8], "big") for key in contents(self.tier)}
        assert self.present <= found <= self.written
        self.present = found

    @precondition(lambda self: hasattr(self, "tier"))
    @invariant()
    def everything_is_exact(self) -> None:
        expected = {hash_of(n): payload_of(n, size_of(n)).tobytes() for n in self.present}
        assert contents(self.tier) == expected

    @precondition(lambda self: hasattr(self, "tier"))
    @invariant()
    def accounts_are_right(self) -> None:
        assert self.tier.used_bytes <= self.tier.capacity_bytes
        live: dict[int, int] = {}
        for batch in self.tier.recover():
            for number in batch.segment.tolist():
                live[number] = live.get(number, 0) + 1
        for segment in self.tier.segments():
            assert segment.live_blocks == live.get(segment.segment, 0)
            assert 0 <= segment.live_pages <= segment.used_pages <= segment.pages

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.tier.close()
            shutil.rmtree(self.directory)


SsdModel.TestCase.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
TestSsdModel = SsdModel.TestCase
