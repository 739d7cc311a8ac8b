"""PoolStore: the pages of one host pool in the store.

Blocks of one pool are one namespace, or one for each group of heads where they are stored apart; a
page then counts as present when all of its groups are. All methods may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvstore import BlockBuffers, BlockHashes, Store
from kvstore_adapters.planning.shards import Shards
from kvstore_adapters.sglang.pools import Pages

Flags: TypeAlias = npt.NDArray[np.bool_]


class PoolStore:
    """Args:
    name: SGLang's name of the pool.
    pages: of each group of its heads.
    shards: where each group is: shard (i, 0) for the i-th. Closed with this object.
    load_timeout: seconds that a load may wait for blocks on ssd.
    """

    def __init__(
        self, name: str, pages: Sequence[Pages], shards: Shards, load_timeout: float
    ) -> None:
        self.name = name
        self.pages = pages[0]
        self._shards = shards
        self._parts = [(part, shards.store(index, 0)) for index, part in enumerate(pages)]
        self._load_timeout = load_timeout

    @property
    def page_bytes(self) -> int:
        return sum(pages.spec.block_bytes for pages, _ in self._parts)

    def match(self, hashes: BlockHashes) -> int:
        """How many leading pages are in the store."""
        return min(store.match(hashes) for _, store in self._parts)

    def contains(self, hashes: BlockHashes) -> Flags:
        """Which pages are in the store, each by itself."""
        present = np.ones(len(hashes), np.bool_)
        for _, store in self._parts:
            present &= store.contains(hashes)
        return present

    def load(self, hashes: BlockHashes, host_indices: torch.Tensor) -> Flags:
        """Copy pages into the host pool; return which of them are there now, whole."""
        numbers = self.pages.numbers(host_indices, len(hashes))
        if self.pages.buffers is None:
            return self._load_staged(hashes, numbers)
        arrived = np.ones(len(hashes), np.bool_)
        for pages, store in self._parts:
            assert pages.buffers is not None
            arrived &= store.load_each(
                hashes, pages.buffers, numbers.numpy(), timeout=self._load_timeout
            )
        return arrived

    def put(self, hashes: BlockHashes, host_indices: torch.Tensor) -> Flags:
        """Copy pages of the host pool into the store; return which are in it now."""
        numbers = self.pages.numbers(host_indices, len(hashes))
        if self.pages.buffers is None:
            return self.put_flat(hashes, [self._page(number) for number in numbers.tolist()])
        stored = np.ones(len(hashes), np.bool_)
        for pages, store in self._parts:
            assert pages.buffers is not None
            stored &= store.put_each(hashes, pages.buffers, numbers.numpy())
        return stored

    def load_flat(self, hashes: BlockHashes) -> tuple[Flags, torch.Tensor]:
        """Load pages as SGLang's flat copies: which came, and one in each row.

        Raises:
            ValueError: this pool's blocks are no flat pages.
        """
        stack = self.pages.stack(len(hashes))
        arrived = np.ones(len(hashes), np.bool_)
        for buffers, store in self._flat_parts(stack):
            arrived &= store.load_each(hashes, buffers, timeout=self._load_timeout)
        return arrived, stack

    def put_flat(self, hashes: BlockHashes, flat_pages: Sequence[torch.Tensor]) -> Flags:
        """Put SGLang's flat copies of pages; return which are in the store now.

        Raises:
            ValueError: this pool's blocks are no flat pages.
        """
        stack = torch.stack(tuple(flat_pages))
        stored = np.ones(len(hashes), np.bool_)
        for buffers, store in self._flat_parts(stack):
            stored &= store.put_each(hashes, buffers)
        return stored

    def clear(self) -> None:
        """Remove the pool's pages from the store, those of other engines too.

        Raises:
            KVStoreError: the daemon is away.
        """
        self._shards.clear()

    def close(self, timeout: float) -> None:
        self._shards.close(timeout)

    def _flat_parts(self, stack: torch.Tensor) -> Iterator[tuple[BlockBuffers, Store]]:
        for pages, store in self._parts:
            if not pages.is_canonical and pages.buffers is not None:
                raise ValueError(f"{self.name}: its pages are stored as pieces, not as flat pages")
            yield pages.flat_buffers(stack), store

    def _page(self, number: int) -> torch.Tensor:
        page: torch.Tensor = self.pages.pool.get_data_page(number * self.pages.page_tokens)
        return page

    def _load_staged(self, hashes: BlockHashes, numbers: torch.Tensor) -> Flags:
        arrived, stack = self.load_flat(hashes)
        for row in np.flatnonzero(arrived).tolist():
            index = int(numbers[row]) * self.pages.page_tokens
            self.pages.pool.set_from_flat_data_page(index, stack[row])
        return arrived
