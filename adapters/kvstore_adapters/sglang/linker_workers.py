"""The two threads of a linker that move bytes: one loads layer by layer, one stores.

Thread safety: `submit` and the other methods are for one thread, SGLang's scheduler.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvstore_adapters.sglang.device_pages import DevicePages, LoadError, PageIds
from kvstore_adapters.sglang.pins import Pin, PinnedPages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Move:
    """Pages of one pool, and the device slots that they come from or go to."""

    name: str
    keys: Sequence[str]
    slots: torch.Tensor


@dataclass(frozen=True)
class LoadJob:
    """What one request loads, and the pin that holds it."""

    moves: list[Move]
    pin: Pin


@dataclass(frozen=True)
class _Batch:
    index: int  # in the layer counter
    jobs: list[LoadJob]
    ready: Any  # event: the slots are ours to write


@dataclass
class _Part:
    """One move under way."""

    pages: DevicePages
    pinned: PinnedPages
    ids: PageIds


class Loader:
    """Loads batches of requests into device pages, in the order of the layers."""

    def __init__(
        self,
        pages: dict[str, DevicePages],
        counter: Any,
        release: Callable[[Pin], None],
        *,
        lease_seconds: float,
        acquire_seconds: float,
    ) -> None:
        self._pages = pages
        self._counter = counter
        self._release = release
        self._lease_seconds = lease_seconds
        self._acquire_seconds = acquire_seconds
        # Bounded by the batches that SGLang runs at a time.
        self._batches: queue.Queue[_Batch | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="kvstore-load")
        self._thread.start()

    def submit(self, jobs: list[LoadJob], ready: Any) -> int:
        """Start a batch; return the number by which the layer counter knows it."""
        index: int = self._counter.update_producer()
        self._batches.put(_Batch(index, jobs, ready))
        return index

    def join(self) -> None:
        """Wait until every batch has ended."""
        self._batches.join()

    def close(self, timeout: float) -> None:
        if self._thread.is_alive():
            self._batches.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (batch := self._batches.get()) is not None:
            try:
                batch.ready.synchronize()
                self._load(batch)
            except BaseException as error:  # noqa: BLE001  the forward pass must not wait for ever
                logger.error("a load failed, SGLang aborts its requests: %r", error)
                self._counter.fail(batch.index, error)
            finally:
                for job in batch.jobs:
                    self._release(job.pin)
                self._batches.task_done()
        self._batches.task_done()  # `join` after `close` waits for nothing

    def _load(self, batch: _Batch) -> None:
        parts = [
            _Part(
                self._pages[move.name],
                _pinned(job.pin, move),
                self._pages[move.name].page_ids(move.slots),
            )
            for job in batch.jobs
            for move in job.moves
        ]
        again: list[PinnedPages] = []
        try:
            for layer in range(self._counter.num_layers):
                for part in parts:
                    self._load_layer(layer, part, again)
                self._counter.complete(batch.index, layer)
        finally:
            for pinned in again:
                pinned.release()

    def _load_layer(self, layer: int, part: _Part, again: list[PinnedPages]) -> None:
        """Once more with a new lease if the first had ended: the layers before were whole, because
        a lease is looked at after each copy."""
        try:
            part.pages.load_layer(layer, part.pinned, part.ids)
        except LoadError as error:
            logger.warning("a load is tried again: %s", error)
            part.pinned = PinnedPages(part.pinned.keys[: len(part.ids)])
            again.append(part.pinned)
            part.pinned.acquire(part.pages, self._lease_seconds, self._acquire_seconds)
            part.pages.load_layer(layer, part.pinned, part.ids)


def _pinned(pin: Pin, move: Move) -> PinnedPages:
    """What a pin holds of a move: nothing where it is of other pages, or not done. Such a load
    fails at its first layer, and is tried again with a lease of its own."""
    held = pin.pages.get(move.name)
    is_held = held is not None and pin.is_done and pin.asks_for({move.name: move.keys})
    return held if held is not None and is_held else PinnedPages(move.keys)


@dataclass(frozen=True)
class _Offload:
    moves: list[Move]
    ready: Sequence[Any]  # events: the pages are computed
    num_pages: int
    is_stored: bool = False  # by somebody else


class Saver:
    """Stores pages in the order in which they were handed over, and reports in that order.

    SGLang keeps the pages of what is under way from being reused, so there is a bound: above it
    pages are not stored, and that is reported in its turn.
    """

    def __init__(
        self,
        pages: dict[str, DevicePages],
        stored: Callable[[str, Sequence[str]], None],
        max_pages: int,
    ) -> None:
        """`stored(pool, keys)`: called on our thread when pages are in the store."""
        self._pages = pages
        self._stored = stored
        self._max_pages = max_pages
        self._num_pages = 0  # queued; guarded by _lock
        self._lock = threading.Lock()
        self._offloads: queue.Queue[_Offload | None] = queue.Queue()
        self._results: deque[bool] = deque()
        self._thread = threading.Thread(target=self._run, daemon=True, name="kvstore-save")
        self._thread.start()

    def submit(self, moves: list[Move], ready: Sequence[Any]) -> None:
        """Store pages, or with too many under way report in their turn that they were not."""
        num_pages = max(len(move.keys) for move in moves)
        with self._lock:
            is_room = self._num_pages + num_pages <= self._max_pages or not self._num_pages
            self._num_pages += num_pages if is_room else 0
        self._offloads.put(_Offload(moves, ready, num_pages) if is_room else _Offload([], (), 0))

    def skip(self) -> None:
        """Report success in its turn: another rank stores these pages."""
        self._offloads.put(_Offload([], (), 0, is_stored=True))

    @property
    def num_results(self) -> int:
        return len(self._results)

    def pop_result(self) -> bool:
        """Whether the oldest offload that ended is in the store."""
        return self._results.popleft()

    def join(self) -> None:
        """Wait until every offload has ended, and forget the results."""
        self._offloads.join()
        self._results.clear()

    def close(self, timeout: float) -> None:
        if self._thread.is_alive():
            self._offloads.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (offload := self._offloads.get()) is not None:
            is_stored = offload.is_stored
            try:
                for event in offload.ready:
                    event.synchronize()
                if offload.moves:
                    is_stored = all(self._store(move) for move in offload.moves)
            except Exception as error:  # noqa: BLE001  the thread goes on; the pages are not stored
                logger.warning("pages were not stored: %r", error)
            with self._lock:
                self._num_pages -= offload.num_pages
            self._results.append(is_stored)
            self._offloads.task_done()
        self._offloads.task_done()  # `join` after `close` waits for nothing

    def _store(self, move: Move) -> bool:
        pages = self._pages[move.name]
        if not pages.put(move.keys, pages.page_ids(move.slots)):
            return False
        self._stored(move.name, move.keys)
        return True
