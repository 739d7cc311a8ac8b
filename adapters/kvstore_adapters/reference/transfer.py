"""The seam between the reference worker and a KV store.

Only full blocks pass through it: the tail of a prompt (fewer than page_tokens tokens) is computed
again by whoever loads the prompt, which is exact and cheaper than a second kind of block. One page
of the pool is one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor  # so that routers need no torch


class PendingLoad(Protocol):
    """A load under way. Until `wait` has returned, the pages belong to it."""

    def done(self) -> bool:
        """True once `wait` returns at once."""

    def wait(self) -> int:
        """Blocks loaded, counted from the first; fewer than asked if some are gone or a deadline
        passed. Never raises for those. May be called again.
        """


@dataclass(frozen=True)
class BlockSave:
    """Blocks of one sequence that this step completes: pages[i] is block first_block + i.

    token_ids are the sequence's tokens up to the end of the last of them, from which the blocks'
    hashes follow.
    """

    request_id: str
    token_ids: Sequence[int]
    first_block: int
    pages: Sequence[int]


class KVTransfer(Protocol):
    """Called from the worker's thread only. A miss, a full store or a lost peer never raises.

    Sequences passed in are the worker's own and change after the call: copy what is needed later.
    """

    def attach(self, pool: Tensor) -> None:
        """Once, before anything else, with the worker's pool (its shape: see `model`)."""

    def match(self, token_ids: Sequence[int], blocks_max: int) -> int:
        """How many full blocks, from the first on and up to blocks_max, a load would find now."""

    def load(self, request_id: str, token_ids: Sequence[int], pages: Sequence[int]) -> PendingLoad:
        """Start to bring the first len(pages) blocks into those pages."""

    def begin_save(self, saves: Sequence[BlockSave]) -> None:
        """Before a forward that completes these blocks (at least one). They may be reserved;
        nothing may be read from the pool yet.
        """

    def save_layer(self, layer: int) -> None:
        """This layer of all pages of the last begin_save is in the pool. Layers come in order."""

    def end_save(self) -> None:
        """All layers are. The pages may be reused after the return, so whatever still reads them
        must finish first.
        """


class NoTransfer:
    """Nothing is shared: every request is computed from its first token."""

    def attach(self, pool: Tensor) -> None:
        pass

    def match(self, token_ids: Sequence[int], blocks_max: int) -> int:
        return 0

    def load(self, request_id: str, token_ids: Sequence[int], pages: Sequence[int]) -> PendingLoad:
        raise AssertionError("nothing matches, so nothing is loaded")

    def begin_save(self, saves: Sequence[BlockSave]) -> None:
        pass

    def save_layer(self, layer: int) -> None:
        pass

    def end_save(self) -> None:
        pass
