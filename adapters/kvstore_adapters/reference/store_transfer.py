"""KVTransfer over a kvstore.Store: the KV of full blocks, shared by all workers of one model.

A miss, a full store or a lost peer costs time, never a wrong token: what does not come is computed.
After an error the store is left alone for RETRY_SECONDS, so that a lost peer costs one deadline and
not one a request.

Blocks are copied by one `put` after the forward. `layerwise=True` copies each layer on a helper
thread beside the forward of the next one instead: on a CPU that gained nothing (2,000 tokens of the
"tiny" model: 504 ms of CPU time with `put`, 493 ms with layers, 497 ms without saving), as the copy
is a hundredth of the forward and wants the same cores. It is for engines whose forward leaves the
CPU idle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from torch import Tensor

from kvstore import (
    BlockHashes,
    BlockSpec,
    CorruptError,
    DeadlineExceededError,
    Hit,
    Namespace,
    OutOfSpaceError,
    PagedBuffers,
    PeerUnavailableError,
    Reservation,
    StorageError,
    Store,
    StoreClosedError,
    Transfer,
    hash_blocks,
)

from .checkpoint import Checkpoint
from .counters import TransferCounters
from .pages import PagePool
from .transfer import BlockSave, PendingLoad, WholeLoad

RETRY_SECONDS = 5.0
LOST = (
    PeerUnavailableError,
    DeadlineExceededError,
    StoreClosedError,
    StorageError,
    OutOfSpaceError,
    CorruptError,
)

_Result = TypeVar("_Result")


def namespace_of(checkpoint: Checkpoint, page_tokens: int, revision: str = "") -> Namespace:
    """The namespace of a model's blocks, the same in every process. Reads all weights."""
    config = checkpoint.config
    spec = BlockSpec(
        num_layers=config.layers,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        block_tokens=page_tokens,
        dtype=str(config.dtype).removeprefix("torch."),
    )
    name = f"{config.family}-{checkpoint.fingerprint()[:32]}"
    return Namespace(model=name, spec=spec, revision=revision)


class _Load(WholeLoad):
    """A background load. Its time is bounded by the store's own deadlines, not by the wait: until
    the copy has ended it may write to the pages."""

    def __init__(self, owner: StoreTransfer, transfer: Transfer, found: Hit) -> None:
        self._owner = owner
        self._transfer = transfer
        self._found = found
        self._loaded: int | None = None

    def done(self) -> bool:
        return self._loaded is not None or self._transfer.done()

    def wait(self) -> int:
        if self._loaded is None:
            self._loaded = self._owner.finish_load(self._transfer, self._found)
        return self._loaded


class _NothingLoaded(WholeLoad):
    def done(self) -> bool:
        return True

    def wait(self) -> int:
        return 0


class StoreTransfer:
    """See `transfer.KVTransfer`. Does not close the store.

    Args:
        store: of `namespace_of` the worker's model.
        read: False: never load, so that nothing computed before is reused.
        write: False: never save.
        layerwise: copy each layer beside the forward of the next one.
        timeout: seconds that a load may wait for lower tiers.
    """

    def __init__(
        self,
        store: Store,
        *,
        read: bool = True,
        write: bool = True,
        layerwise: bool = False,
        timeout: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters = TransferCounters()
        self._store = store
        self._spec = store.namespace.spec
        self._read = read
        self._write = write
        self._timeout = timeout
        self._clock = clock
        self._retry_at = float("-inf")
        self._saves: list[tuple[BlockHashes, list[int]]] = []
        self._reserved: list[tuple[Reservation, list[int]]] = []
        self._copies: list[Future[None]] = []
        self._copier = ThreadPoolExecutor(1, "kv-copy") if layerwise else None

    def attach(self, pool: Tensor, pages: PagePool) -> None:
        self._buffers = PagedBuffers.reference(pool, self._spec)

    def poll(self) -> None:
        pass

    def reaches_store(self) -> bool:
        """Whether the store answers now, and is not left alone after an error."""
        if self._clock() < self._retry_at:
            return False
        try:
            return "kvstore_cpu_capacity_bytes" in self._store.stats()
        except LOST:
            return False

    # --- loading

    def match(self, request_id: str, token_ids: Sequence[int], blocks_max: int) -> int:
        self.counters.queried_blocks += blocks_max
        if not self._read or blocks_max == 0:
            return 0
        started = self._clock()
        hashes = self._hashes(token_ids, blocks_max)
        found = self._guarded(lambda: self._store.match(hashes), 0)
        self.counters.load_seconds += self._clock() - started
        return found

    def load(self, request_id: str, token_ids: Sequence[int], pages: Sequence[int]) -> PendingLoad:
        hashes, ids = self._hashes(token_ids, len(pages)), list(pages)
        started = self._clock()

        def start() -> PendingLoad:
            found = self._store.lookup(hashes)
            transfer = self._store.load(
                hashes, self._buffers, ids, background=True, timeout=self._timeout
            )
            return _Load(self, transfer, found)

        nothing: PendingLoad = _NothingLoaded()
        load = self._guarded(start, nothing)
        self.counters.load_seconds += self._clock() - started
        return load

    def finish_load(self, transfer: Transfer, found: Hit) -> int:
        """Wait for a load, and count it. For `_Load`."""
        started = self._clock()
        # Also while the store is left alone: this load was under way before the error.
        try:
            loaded = transfer.wait().num_blocks
        except LOST:
            self._leave_alone()
            loaded = 0
        counters = self.counters
        counters.load_seconds += self._clock() - started
        counters.hit_cpu_blocks += min(loaded, found.num_cpu)
        counters.hit_ssd_blocks += loaded - min(loaded, found.num_cpu)
        counters.loaded_bytes += loaded * self._spec.block_bytes
        return loaded

    # --- saving

    def begin_save(self, saves: Sequence[BlockSave]) -> None:
        if not self._write:
            return
        for save in saves:
            hashes = self._hashes(save.token_ids, save.first_block + len(save.pages))
            self._saves.append((hashes[save.first_block :], list(save.pages)))
        if self._copier is not None:
            self._guarded(self._reserve, None)

    def save_layer(self, layer: int) -> None:
        if self._copier is not None and self._reserved:
            # The list goes along: this thread may have begun the next save when the copy runs.
            self._copies.append(self._copier.submit(self._copy_layer, self._reserved, layer))

    def end_save(self) -> None:
        started = self._clock()
        saves, self._saves = self._saves, []
        if self._copier is not None:
            self._commit()
        else:
            for hashes, pages in saves:
                self._guarded(lambda h=hashes, p=pages: self._put(h, p), None)  # type: ignore[misc]
        self.counters.save_seconds += self._clock() - started

    def abort_save(self) -> None:
        self._saves = []
        if self._copier is not None:
            self._commit(keep=False)

    def _put(self, hashes: BlockHashes, pages: list[int]) -> None:
        self._count_saved(self._store.put(hashes, self._buffers, pages))

    def _reserve(self) -> None:
        for hashes, pages in self._saves:
            reservation = self._store.reserve(hashes)
            wanted = [page for page, want in zip(pages, reservation.wanted, strict=True) if want]
            self._reserved.append((reservation, wanted))

    def _copy_layer(self, reserved: list[tuple[Reservation, list[int]]], layer: int) -> None:
        for reservation, pages in reserved:
            reservation.write(self._buffers, pages, layers=(layer, layer + 1))

    def _commit(self, keep: bool = True) -> None:
        reserved, self._reserved = self._reserved, []
        copies, self._copies = self._copies, []
        # Wait for all, whatever happened: until then they read the pages.
        failed = [copy.exception() for copy in copies]
        for reservation, _ in reserved:
            if keep and not any(failed):
                self._guarded(lambda r=reservation: self._count_saved(r.commit()), None)  # type: ignore[misc]
            # Whatever was not committed would stay reserved as long as this client lives.
            with suppress(*LOST):
                reservation.abort()
        for error in failed:
            if isinstance(error, LOST):
                self._leave_alone()
            elif error is not None:
                raise error

    def _count_saved(self, transfer: Transfer) -> None:
        stored = transfer.wait().num_stored
        self.counters.saved_blocks += stored
        self.counters.saved_bytes += stored * self._spec.block_bytes

    # ---

    def _hashes(self, token_ids: Sequence[int], num_blocks: int) -> BlockHashes:
        # From the first token each time: 2,000 tokens take 0.1 ms, less than any bookkeeping of
        # chains by request would be worth.
        tokens = self._spec.block_tokens
        return hash_blocks(list(token_ids[: num_blocks * tokens]), tokens)

    def _guarded(self, action: Callable[[], _Result], otherwise: _Result) -> _Result:
        """The action's result, or `otherwise` when the store is lost."""
        if self._clock() < self._retry_at:
            return otherwise
        try:
            return action()
        except LOST:
            self._leave_alone()
            return otherwise

    def _leave_alone(self) -> None:
        self.counters.errors += 1
        self._retry_at = self._clock() + RETRY_SECONDS

    def close(self) -> None:
        """End the helper thread."""
        if self._copier is not None:
            self._copier.shutdown(wait=True)
