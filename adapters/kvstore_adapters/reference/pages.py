"""Which pages of the KV pool are in use.

Not thread-safe. Invariant: a page is on the free list exactly when its count is zero.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.errors import ConfigError, OutOfSpaceError


class PagePool:
    """Counts references to pages. The lowest page numbers that were freed last are handed out
    first.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ConfigError(f"num_pages: {num_pages} is not positive")
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def pages_free(self) -> int:
        return len(self._free)

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
                self._free.append(page)
