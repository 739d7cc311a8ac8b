"""Pins: leases for the requests that wait to be scheduled, taken on a thread of their own.

SGLang aborts a request whose load fails, so what a lookup promises has to stay in the store until
it is loaded. A request's pages are pinned as soon as it is looked up; SGLang says nothing when a
request that was looked up goes away, so a pin that is not taken ends by its age.

One thread asks the store. While it waits for a store that does not answer nobody waits for it: see
`wait`. Every pin ends by `release`, by its lease's time, or with the store.

Thread safety: the methods of Pins may be called from any thread; `_lock` guards _pins.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvstore import BlockHashes, KVStoreError, Lease, Store
from kvstore_adapters.planning.notices import Notices

logger = logging.getLogger(__name__)

MAX_QUEUED = 64  # requests whose pins are asked for; more are not asked for at all
MAX_PINS = 256


Wants: TypeAlias = Mapping[str, Sequence[str]]  # the pages of each pool


class PinSource(Protocol):
    """One pool's store, as pins need it."""

    @property
    def store(self) -> Store: ...
    def hashes(self, keys: Sequence[str]) -> BlockHashes: ...


@dataclass(eq=False)
class PinnedPages:
    """Leading pages of `keys`, held by consecutive leases."""

    keys: Sequence[str]
    leases: list[Lease] = field(default_factory=list)

    @property
    def num_pages(self) -> int:
        return sum(len(lease) for lease in self.leases)

    def acquire(self, source: PinSource, ttl: float, timeout: float) -> None:
        """Pin what of the pages is there. A store behind a socket leases a piece at a time, so ask
        until nothing more comes."""
        hashes = source.hashes(self.keys)
        begin = 0
        while begin < len(hashes):
            lease = source.store.acquire(hashes[begin:], ttl=ttl, timeout=timeout)
            if not len(lease):
                lease.release()
                return
            self.leases.append(lease)
            begin += len(lease)

    def release(self) -> None:
        leases, self.leases = self.leases, []
        for lease in leases:
            with contextlib.suppress(KVStoreError):
                lease.release()

    def parts(self, ids: npt.NDArray[np.int64]) -> Iterator[tuple[Lease, npt.NDArray[np.int64]]]:
        """Each lease with those of `ids` whose leading pages it holds."""
        for lease in self.leases:
            if len(ids):
                yield lease, ids[: len(lease)]
                ids = ids[len(lease) :]

    def are_intact(self, num_pages: int) -> bool:
        """Return whether the leading `num_pages` are pinned, and still those that were."""
        for lease in self.leases:
            wanted = min(num_pages, len(lease))
            if lease.num_intact() < wanted:
                return False
            num_pages -= wanted
        return num_pages == 0


@dataclass(eq=False)
class Pin:
    """What was asked for one request, by pool, and what came of it."""

    pages: dict[str, PinnedPages]
    born: float = field(default_factory=time.monotonic)
    _done: threading.Event = field(default_factory=threading.Event)

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def finish(self) -> None:
        """Say that no more leases will come."""
        self._done.set()

    def wait(self, seconds: float) -> bool:
        return self._done.wait(seconds)

    def asks_for(self, wants: Wants) -> bool:
        """Return whether all of `wants` was asked for, whatever came of it."""
        return all(
            name in self.pages and list(self.pages[name].keys[: len(keys)]) == list(keys)
            for name, keys in wants.items()
        )

    def holds(self, wants: Wants) -> bool:
        """Return whether all of `wants` is pinned, and was when we looked still intact."""
        return (
            self.is_done
            and self.asks_for(wants)
            and all(self.pages[name].are_intact(len(keys)) for name, keys in wants.items())
        )

    def release(self) -> None:
        """End the leases. REQUIRES: the pin is done."""
        for pages in self.pages.values():
            pages.release()


class Pins:
    """The pins of all requests that were looked up and not yet loaded."""

    def __init__(
        self,
        sources: Mapping[str, PinSource],
        *,
        lease_seconds: float,
        acquire_seconds: float,
        idle_seconds: float,
        found: Callable[[str, Sequence[str], int], None],
        idle: Callable[[], None],
    ) -> None:
        """`found(pool, keys, n)`: called on our thread when the first n of `keys` turned out to be
        there, and no more. `idle()`: called on our thread about every `idle_seconds`."""
        self._sources = sources
        self._lease_seconds = lease_seconds
        self._acquire_seconds = acquire_seconds
        self._idle_seconds = idle_seconds
        self._found = found
        self._idle = idle
        self._pins: dict[str, Pin] = {}  # by request, oldest first
        self._lock = threading.Lock()
        self._asked: queue.Queue[Pin | None] = queue.Queue(MAX_QUEUED)
        # Ending a lease asks the store as well, so it is not for the scheduler's thread. Bounded by
        # what was asked for.
        self._ended: deque[Pin] = deque()
        self._notices = Notices(logger)
        self._busy_since = float("inf")
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="kvstore-pins")
        self._thread.start()

    def __len__(self) -> int:
        return len(self._pins)

    def begin(self, request_id: str, asks: Wants, wants: Wants) -> Pin | None:
        """Start to pin pages for a request; None when too many are asked for already.

        The same question again gives the same pin, for as long as its answer is fresh.

        Args:
            asks: the pages to pin, as far as they are there.
            wants: those of them that are thought to be there; asked for again if they were not.
        """
        with self._lock:
            pin = self._pins.get(request_id)
            if pin is not None and pin.asks_for(asks) and self._is_fresh(pin, wants):
                return pin
            self._drop(request_id)
            pin = Pin({name: PinnedPages(keys) for name, keys in asks.items()})
            try:
                self._asked.put_nowait(pin)
            except queue.Full:
                return None
            self._pins[request_id] = pin
            self._sweep()
            return pin

    def wait(self, pin: Pin, seconds: float) -> bool:
        """Wait for a pin; not at all while the store is slower than that with another one."""
        if pin.is_done or time.monotonic() - self._busy_since > seconds:
            return pin.is_done
        return pin.wait(seconds)

    def take(self, request_id: str) -> Pin | None:
        """Hand a request's pin over to the caller, who gives it to `release`."""
        with self._lock:
            return self._pins.pop(request_id, None)

    def release(self, pin: Pin) -> None:
        """End a pin's leases soon, on our thread."""
        self._ended.append(pin)

    def clear(self) -> None:
        with self._lock:
            for request_id in list(self._pins):
                self._drop(request_id)

    def close(self, timeout: float) -> None:
        self.clear()
        self._is_closing = True
        with contextlib.suppress(queue.Full):
            self._asked.put_nowait(None)
        self._thread.join(timeout)

    def _is_fresh(self, pin: Pin, wants: Wants) -> bool:
        age = time.monotonic() - pin.born
        if pin.is_done and not wants:
            return age < self._idle_seconds  # nothing was there; others may have stored it since
        return age < self._lease_seconds / 2 and (not pin.is_done or pin.holds(wants))

    def _sweep(self) -> None:
        """Drop the pins of requests that seem to have gone, and the oldest of too many."""
        now = time.monotonic()
        for request_id, pin in list(self._pins.items())[:-1]:
            if len(self._pins) <= MAX_PINS and now - pin.born <= self._lease_seconds:
                return
            self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        pin = self._pins.pop(request_id, None)
        if pin is not None:
            self._ended.append(pin)

    def _run(self) -> None:
        idled = time.monotonic()
        while not self._is_closing:
            with contextlib.suppress(queue.Empty):
                pin = self._asked.get(timeout=self._idle_seconds)
                if pin is not None:
                    self._busy_since = time.monotonic()
                    self._ask(pin)
                    self._busy_since = float("inf")
            self._end_some()
            if time.monotonic() - idled >= self._idle_seconds:
                idled = time.monotonic()
                self._attempt(self._idle)
        while not self._asked.empty():
            pin = self._asked.get_nowait()
            if pin is not None:
                pin.finish()
        self._end_some()

    def _ask(self, pin: Pin) -> None:
        try:
            for name, pages in pin.pages.items():
                self._attempt(lambda: self._pin(name, pages))  # noqa: B023  called at once
        finally:
            pin.finish()

    def _pin(self, name: str, pages: PinnedPages) -> None:
        pages.acquire(self._sources[name], self._lease_seconds, self._acquire_seconds)
        self._found(name, pages.keys, pages.num_pages)

    def _end_some(self) -> None:
        """End what can be ended; a pin in the queue before its question was asked has no leases."""
        for _ in range(len(self._ended)):
            pin = self._ended.popleft()
            if pin.is_done:
                pin.release()
            else:
                self._ended.append(pin)

    def _attempt(self, work: Callable[[], None]) -> None:
        """This thread outlives whatever goes wrong: without it nothing is found any more."""
        try:
            work()
        except Exception as error:  # noqa: BLE001  also what is no KVStoreError
            self._notices.warn("pages could not be looked for", repr(error))
