"""HashIndex: which pages are thought to be in the store, known without asking it.

SGLang asks a linker what it has on the scheduler's thread, for every request that it considers, so
the answer has to be a look into a table of this process. The table is fed by our own puts, by what
background queries found, and by the store's events. It may be wrong both ways: a page that it does
not know is asked for in the background, a page that has gone since is found missing when it is
pinned, before anybody relies on it.

Thread safety: all methods may be called from any thread. `_lock` guards writers; readers take no
lock, because one look-up in a dict is atomic.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from kvstore import AllBlocksCleared, BlockRemoved, BlockStored


class HashIndex:
    """A bounded set of page hashes (hex, as SGLang writes them); full, it forgets the oldest."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._known: dict[str, None] = {}  # in the order of the last `add`
        self._lock = threading.Lock()
        self._sequence = -1  # of the last event; -1: none yet

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, page_hash: str) -> bool:
        return page_hash in self._known

    def leading(self, hashes: Sequence[str]) -> int:
        """Return how many leading pages are known."""
        return [*map(self._known.__contains__, hashes), False].index(False)

    def add(self, hashes: Iterable[str]) -> None:
        with self._lock:
            for page_hash in hashes:
                self._known.pop(page_hash, None)
                self._known[page_hash] = None
            for _ in range(len(self._known) - self._capacity):
                del self._known[next(iter(self._known))]

    def discard(self, hashes: Iterable[str]) -> None:
        with self._lock:
            for page_hash in hashes:
                self._known.pop(page_hash, None)

    def clear(self) -> None:
        with self._lock:
            self._known.clear()

    def apply(self, events: Iterable[BlockStored | BlockRemoved | AllBlocksCleared]) -> None:
        """Take in the store's events. After a gap in their numbers nothing is known any more."""
        for event in events:
            is_cleared = isinstance(event, AllBlocksCleared)
            rows = 1 if isinstance(event, AllBlocksCleared) else len(event.block_hashes)
            if is_cleared or 0 <= self._sequence != event.sequence - rows:
                self.clear()
            self._sequence = event.sequence
            if isinstance(event, BlockStored):
                self.add(block_hash.hex() for block_hash in event.block_hashes)
            elif isinstance(event, BlockRemoved):
                # It may still be in the other tier; then the next query finds it again.
                self.discard(block_hash.hex() for block_hash in event.block_hashes)
