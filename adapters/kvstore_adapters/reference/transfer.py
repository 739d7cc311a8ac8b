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

    from .pages import PagePool


class PendingLoad(Protocol):
    """A load under way. Until `wait` has returned, the pages belong to it."""

    def done(self) -> bool:
        """True once `wait` returns at once."""

    def wait(self) -> int:
        """Blocks loaded, counted from the first; fewer than asked if some are gone or a deadline
        passed. Never raises for those. May be called again.
        """

    def abandon(self) -> None:
        """Nothing of it is wanted any more. Pages that it may still write to are held (see
        `pages`); it may wait instead.
        """

    def layers_ready(self) -> int:
        """How many layers, from the first, are there for all blocks. 0 where blocks come whole."""

    def wait_layer(self, layer: int) -> bool:
        """Wait until that layer is there for all blocks; False: it does not come in time."""


class WholeLoad:
    """What loads have in common whose blocks come whole, and soon."""

    def wait(self) -> int:
        raise NotImplementedError

    def abandon(self) -> None:
        self.wait()

    def layers_ready(self) -> int:
        return 0

    def wait_layer(self, layer: int) -> bool:
        self.wait()
        return False


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

    def attach(self, pool: Tensor, pages: PagePool) -> None:
        """Once, before anything else, with the worker's pool (its shape: see `model`), and which
        of its pages are in use.
        """

    def poll(self) -> None:
        """Before each step: drop what holds on pages have become needless."""

    def match(self, request_id: str, token_ids: Sequence[int], blocks_max: int) -> int:
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
        must finish first, or hold them.
        """

    def abort_save(self) -> None:
        """In place of end_save: the forward was given up. The blocks may be incomplete."""


class NoTransfer:
    """Nothing is shared: every request is computed from its first token."""

    def attach(self, pool: Tensor, pages: PagePool) -> None:
        pass

    def poll(self) -> None:
        pass

    def match(self, request_id: str, token_ids: Sequence[int], blocks_max: int) -> int:
        return 0

    def load(self, request_id: str, token_ids: Sequence[int], pages: Sequence[int]) -> PendingLoad:
        raise AssertionError("nothing matches, so nothing is loaded")

    def begin_save(self, saves: Sequence[BlockSave]) -> None:
        pass

    def save_layer(self, layer: int) -> None:
        pass

    def end_save(self) -> None:
        pass

    def abort_save(self) -> None:
        pass
