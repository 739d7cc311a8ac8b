"""What a killed writer acknowledged, and whether the directory keeps that promise."""

from pathlib import Path

from tests.crash.ssd_writer import SETTINGS, size_of
from tests.ssd_support import contents, hash_of, open_tier, payload_of


class Promises:
    """Blocks that must be there, and blocks that may be."""

    def __init__(self) -> None:
        self.must: set[int] = set()

    def hear(self, output: str) -> None:
        for line in output.splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # the writer died in the middle of a line: nothing was promised
            kind, *words = line.split()
            numbers = set(map(int, words))
            if kind == "a":
                self.must |= numbers
            elif kind == "f":
                self.must -= numbers

    def check(self, path: Path, kind: str, miss_allowed: bool = False) -> int:
        """Opens, compares every byte, and takes what is there as the new truth."""
        with open_tier(path, kind, **SETTINGS) as tier:
            found = contents(tier)
            assert tier.counters["index_damaged"] == tier.counters["index_bad_records"] == 0
        for key, got in found.items():
            number = int.from_bytes(key[:8], "big")
            if got is not None:
                assert got == payload_of(number, size_of(number)).tobytes(), f"block {number}"
        here = {key for key, got in found.items() if got is not None}
        lost = {number for number in self.must if hash_of(number) not in here}
        if not miss_allowed:
            assert not lost, f"{len(lost)} acknowledged blocks are missing: {sorted(lost)[:5]}"
        count = len(self.must)
        self.must = {int.from_bytes(key[:8], "big") for key in here}
        return count
