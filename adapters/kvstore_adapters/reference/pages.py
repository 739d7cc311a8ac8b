"""Which pages of the KV pool are in use.

A page has references, of sequences, and holds, of transfers that may still read or write it when
its sequence has gone. Not thread-safe. Invariant: a page is on the free list exactly when it has
neither.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore import ConfigError, OutOfSpaceError


class PagePool:
    """Counts references to pages. The lowest page numbers that were freed last are handed out
    first.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ConfigError(f"num_pages: {num_pages} is not positive")
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._holds = [0] * num_pages
        self._only_held = 0
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def pages_free(self) -> int:
        return len(self._free)

    @property
    def pages_held(self) -> int:
        """Pages that only a transfer keeps from being free: they come back when it has ended."""
        return self._only_held

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one reference each, or OutOfSpaceError and nothing. Ask `pages_free`
        first.
        """
        if count > len(self._free):
            raise OutOfSpaceError(
                f"{count} pages wanted, {len(self._free)} of {self.num_pages} free"
            )
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One more reference to each page, for whoever still reads it, such as a save in flight."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        for page in pages:
            assert self._references[page] > 0, f"page {page} is already free"
            self._references[page] -= 1
            if self._references[page] == 0:
                if self._holds[page]:
                    self._only_held += 1
                else:
                    self._free.append(page)

    def hold(self, pages: Iterable[int]) -> None:
        """Keep each page from being handed out, also after its last reference has gone."""
        for page in pages:
            assert self._references[page] > 0, f"page {page} is free"
            self._holds[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """End one hold on each page."""
        for page in pages:
            assert self._holds[page] > 0, f"page {page} is not held"
            self._holds[page] -= 1
            if self._holds[page] == 0 and self._references[page] == 0:
                self._only_held -= 1
                self._free.append(page)

    def is_held(self, page: int) -> bool:
        return self._holds[page] > 0
