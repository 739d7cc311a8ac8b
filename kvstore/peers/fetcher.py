"""Fetcher: one fetch for all who wait for the same blocks.

A request is a chain and the holders to ask. Its missing blocks are *claimed*, and one flight brings
them. A request whose first missing block is claimed already waits for that flight, without a
thread, and then looks again: most times all it wanted has come. So however many ask for a block, it
is on its way once.

    request --all here--> answered
       |  ^
       |  '-- the claim is over --- joined (waits for another's flight)
       '----> flight --> again, while something came or may come --> answered
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from kvstore import _native
from kvstore.block import BlockHashes
from kvstore.peers.bandwidth import Bandwidth
from kvstore.peers.counts import PeerCounts
from kvstore.peers.flight import Flight
from kvstore.peers.quarantine import Quarantine
from kvstore.peers.slots import Slots
from kvstore.peers.sources import Source
from kvstore.peers.threads import Threads
from kvstore.tiers.fetching import Wanted

log = logging.getLogger(__name__)

FLIGHTS_MAX = 8  # at a time
QUEUED_MAX = 1024  # requests; more are not begun
ROUNDS_MAX = 4  # flights of one request: something failed, and may go well another time
_PENDING_SECONDS = 1.0  # for blocks that somebody else is writing here
_WAIT_SLICE_SECONDS = 0.25
_BEING_WRITTEN = 4  # residency

Find = Callable[[str, Wanted], Source]  # the holder at an address, for a tenant's namespace


@dataclass(eq=False, slots=True)
class _Request:
    wanted: Wanted
    holders: list[str]
    deadline: float
    future: Future[int] = field(default_factory=Future)
    rounds: int = 0


@dataclass(eq=False, slots=True)
class _Claim:
    """Blocks that are on their way, and who waits for them too."""

    keys: list[tuple[int, bytes]]
    joined: list[_Request] = field(default_factory=list)


class Fetcher:
    """See `kvstore.tiers.fetching.Fetches`. Thread-safe: `_lock` guards `_claims`."""

    def __init__(
        self,
        core: _native.StoreCore,
        find: Find,
        *,
        bandwidth: int = 0,
        stored: Callable[[int, BlockHashes], None] = lambda _number, _hashes: None,
    ) -> None:
        """
        Args:
            bandwidth: bytes a second, 0 for no bound.
            stored: is told of a namespace's blocks that came.
        """
        self._core = core
        self._owner = core.new_owner()
        self._arena_address = core.arena.ctypes.data
        self._find = find
        self._stored = stored
        self._bandwidth = Bandwidth(bandwidth)
        self.counts = PeerCounts()
        self.quarantine = Quarantine()
        self._threads = Threads("kvstore-fetch", FLIGHTS_MAX, QUEUED_MAX)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._claims: dict[tuple[int, bytes], _Claim] = {}

    def fetch(self, wanted: Wanted, holders: list[str], timeout: float) -> Future[int]:
        request = _Request(wanted, holders, time.monotonic() + timeout)
        self.counts.fetch(is_joined=False)
        self._serve_later(request)
        return request.future

    @property
    def num_claimed(self) -> int:
        """Blocks on their way."""
        with self._lock:
            return len(self._claims)

    def close(self, timeout: float) -> bool:
        """Begin nothing any more; wait for what is under way. Returns whether that has ended, and
        nothing writes into our slots any more."""
        deadline = time.monotonic() + timeout
        self._closing.set()
        ended = self._threads.close(timeout)
        return self.quarantine.close(max(0.0, deadline - time.monotonic())) and ended

    # --- one request

    def _serve_later(self, request: _Request) -> None:
        if not self._threads.submit(lambda: self._serve(request)):
            self.counts.failed("busy")
            self._answer(request)

    def _answer(self, request: _Request) -> None:
        if request.future.set_running_or_notify_cancel():
            request.future.set_result(self._available(request.wanted))

    def _available(self, wanted: Wanted) -> int:
        return self._core.match(wanted.number, wanted.hashes.array, wanted.hashes.start)

    def _is_over(self, request: _Request) -> bool:
        return (
            self._closing.is_set()
            or time.monotonic() >= request.deadline
            or request.future.cancelled()
        )

    def _serve(self, request: _Request) -> None:
        try:
            while not self._is_over(request):
                begin = self._available(request.wanted)
                missing = request.wanted.hashes[begin:]
                if len(missing) == 0:
                    break
                claim = self._claim(request, missing)
                if claim is None:
                    self.counts.fetch(is_joined=True)
                    return  # is served again when that flight is over
                try:
                    goes_on = self._fly(request, begin, begin + len(claim.keys))
                finally:
                    self._release(claim)
                if not goes_on:
                    break
        except Exception:
            log.exception("a fetch failed")
        self._answer(request)

    def _claim(self, request: _Request, missing: BlockHashes) -> _Claim | None:
        """Claim the leading missing blocks; None where the first is claimed, and joined."""
        number = request.wanted.number
        keys = [(number, row.tobytes()) for row in missing.array]
        with self._lock:
            other = self._claims.get(keys[0])
            if other is not None:
                other.joined.append(request)
                return None
            for count, key in enumerate(keys):
                if key in self._claims:
                    del keys[count:]
                    break
            claim = _Claim(keys)
            self._claims.update(dict.fromkeys(keys, claim))
        return claim

    def _release(self, claim: _Claim) -> None:
        with self._lock:
            for key in claim.keys:
                del self._claims[key]
        for request in claim.joined:
            self._serve_later(request)

    def _fly(self, request: _Request, begin: int, end: int) -> bool:
        """Fetch blocks [begin, end) once; return whether to look again."""
        request.rounds += 1
        wanted = request.wanted
        missing = wanted.hashes[begin:end]
        sources: Sequence[Source] = [self._find(address, wanted) for address in request.holders]
        slots = Slots(self._core, self._owner, wanted.number, self._arena_address)
        flight = Flight(
            missing,
            slots,
            sources,
            request.deadline,
            bandwidth=self._bandwidth,
            quarantine=self.quarantine,
            counts=self.counts,
            closing=self._closing,
        )
        flight.run()
        if flight.num_fetched:
            self._stored(wanted.number, missing)
        there = self._available(wanted)
        if there == len(wanted.hashes):
            return False
        if self._is_being_written(wanted, there):
            until = min(request.deadline, time.monotonic() + _PENDING_SECONDS)
            return self._wait_for_writer(wanted, there, until) and request.rounds < ROUNDS_MAX
        # What failed may go well another time.
        return there >= end or (flight.had_trouble and request.rounds < ROUNDS_MAX)

    def _wait_for_writer(self, wanted: Wanted, block: int, until: float) -> bool:
        """Wait for who writes this block here; return whether that has ended."""
        while not self._closing.is_set():
            seen = self._core.change_count
            if not self._is_being_written(wanted, block):
                return True
            left = until - time.monotonic()
            if left <= 0:
                break
            self._core.wait_for_change(seen, min(left, _WAIT_SLICE_SECONDS))
        return False

    def _is_being_written(self, wanted: Wanted, block: int) -> bool:
        found = self._core.residency(wanted.number, wanted.hashes.array[block : block + 1])
        return bool(found[0] & _BEING_WRITTEN)
