"""Lookups: how much of each waiting request's prompt the store holds, asked in the background.

A scheduler asks again and again, in every step, and must not wait for a daemon: threads of ours do
the asking, the answer is kept, and `result` is a look into a dict. A request without an answer by
its deadline has none: 0 tokens, and so it stays until it begins anew.

    begin --> asked for --answer, or deadline--> known --forget--> gone
                 |  ^
                 v  | a moment later, until the wanted tokens are there or their time is over
              waiting (prefill elsewhere is still saving)

Thread safety: all methods may be called from any thread. `_lock` guards the heap and the dict; an
entry's `tokens` is set once, under `_lock`.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvstore import Store, Transfer

from .chains import Chain
from .groups import Group, alignment_tokens, hit_tokens, needed_blocks
from .notices import Notices
from .shards import Shards

# How often a prefill's last block is looked for: one small request to the daemon each time.
_POLL_SECONDS_FIRST = 0.002
_POLL_SECONDS_LONGEST = 0.02


class _Lookup:
    """One request's: what is asked, and the answer once it is known."""

    __slots__ = (
        "chain",
        "deadline",
        "done",
        "fetches",
        "holder",
        "limit",
        "poll_seconds",
        "tokens",
        "wait_until",
        "want",
    )

    def __init__(
        self,
        chain: Chain,
        limit: int,
        deadline: float,
        want: int,
        wait_until: float,
        holder: str,
    ) -> None:
        self.chain = chain
        self.limit = limit
        self.deadline = deadline
        self.want = want  # 0: what is there counts
        self.wait_until = wait_until
        self.holder = holder  # a daemon that has, or will have, what is wanted; "": ours
        self.fetches: list[Transfer] = []  # from there, under way
        self.poll_seconds = _POLL_SECONDS_FIRST
        self.tokens: int | None = None
        self.done = threading.Event()


class Lookups:
    """See above."""

    def __init__(
        self, shards: Shards, groups: Sequence[Group], timeout: float, threads: int = 1
    ) -> None:
        """
        Args:
            timeout: seconds after which a request counts as not found.
            threads: that ask. One is enough: a store answers in a fraction of a millisecond, or
                fails all its calls at once while its daemon is away.
        """
        self._shards = shards
        self._groups = tuple(groups)
        self._step = alignment_tokens(groups)
        self._timeout = timeout
        self._notices = Notices(logging.getLogger(__name__))
        self._entries: dict[str, _Lookup] = {}
        self._due: list[tuple[float, int, _Lookup]] = []  # a heap, by when to ask
        self._count = itertools.count()
        self._is_closed = False
        self._lock = threading.Lock()
        self._has_due = threading.Condition(self._lock)
        self._threads = [
            threading.Thread(target=self._run, name=f"kvstore-lookup-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def begin(
        self,
        request_id: str,
        chain: Chain,
        limit_tokens: int,
        *,
        want_tokens: int = 0,
        wait_seconds: float = 0.0,
        holder: str = "",
    ) -> None:
        """Start a request's lookup; one that was begun before is forgotten.

        Args:
            chain: its hashes; may grow meanwhile.
            limit_tokens: no more are of use.
            want_tokens: wait for so many to be there,
            wait_seconds: for so long. Then what is there counts.
            holder: a daemon from which ours shall fetch them meanwhile.
        """
        now = time.monotonic()
        # No more than `result` can be.
        want = self._whole(min(want_tokens, limit_tokens, len(chain) * chain.hash_tokens))
        wait_until = now + (wait_seconds if want else 0.0)
        deadline = wait_until + self._timeout
        entry = _Lookup(chain, limit_tokens, deadline, want, wait_until, holder)
        with self._lock:
            former = self._entries.get(request_id)
            if former is not None:
                self._settle(former, 0)
            self._entries[request_id] = entry
            if self._is_closed:
                self._settle(entry, 0)
                return
            heapq.heappush(self._due, (now, next(self._count), entry))
            self._has_due.notify()

    def result(self, request_id: str, wait_seconds: float = 0.0) -> int | None:
        """Return how many tokens are there as one prefix, in every group of every rank.

        None: not known yet, ask again. A request that was not begun has 0.
        """
        entry = self._entries.get(request_id)
        if entry is None:
            return 0
        if entry.tokens is not None:
            return entry.tokens
        if wait_seconds > 0 and entry.done.wait(wait_seconds):
            return entry.tokens
        if time.monotonic() >= entry.deadline:
            with self._lock:
                self._settle(entry, 0)
        return entry.tokens

    def forget(self, request_id: str) -> None:
        """Drop a request's lookup, whatever became of it."""
        with self._lock:
            entry = self._entries.pop(request_id, None)
            if entry is not None:
                self._settle(entry, 0)  # so that nobody asks for it any more

    def close(self, timeout: float = 5.0) -> None:
        """Settle what is open as not found; wait at most `timeout` seconds for who is asking."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._is_closed = True
            self._due.clear()
            for entry in self._entries.values():
                self._settle(entry, 0)
            self._has_due.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _settle(self, entry: _Lookup, tokens: int) -> None:
        """REQUIRES: _lock is held."""
        if entry.tokens is None:
            entry.tokens = tokens
            entry.done.set()

    # --- asking

    def _run(self) -> None:
        while (entry := self._next()) is not None:
            now = time.monotonic()
            if entry.tokens is not None:
                continue
            tokens: int | None = 0
            if now < entry.deadline:
                try:
                    tokens = self._ask(entry, now)
                except Exception as error:  # noqa: BLE001  a store that fails has nothing
                    self._notices.warn("nothing was found", f"{type(error).__name__}: {error}")
            with self._lock:
                if tokens is not None:
                    self._settle(entry, tokens)
                elif not self._is_closed:
                    due = time.monotonic() + entry.poll_seconds
                    entry.poll_seconds = min(2 * entry.poll_seconds, _POLL_SECONDS_LONGEST)
                    heapq.heappush(self._due, (due, next(self._count), entry))

    def _next(self) -> _Lookup | None:
        """Return the next lookup to be made, once it is due; None when we are closed."""
        with self._lock:
            while not self._is_closed:
                if not self._due:
                    self._has_due.wait()
                    continue
                left = self._due[0][0] - time.monotonic()
                if left <= 0:
                    return heapq.heappop(self._due)[2]
                self._has_due.wait(left)
            return None

    def _ask(self, entry: _Lookup, now: float) -> int | None:
        """Return the tokens that are there; None: fewer than wanted, and there is time left."""
        if entry.want and now < entry.wait_until and not self._has_last(entry):
            if entry.holder:
                self._fetch(entry)
            return None
        tokens = self._tokens(entry.chain, entry.limit)
        return tokens if tokens >= entry.want or now >= entry.wait_until else None

    def _fetch(self, entry: _Lookup) -> None:
        """Have our daemon bring what the holder has by now, unless it is at it."""
        if not all(fetch.done() for fetch in entry.fetches):
            return
        entry.fetches = []
        for group in self._groups:
            needed = needed_blocks(group, 0, entry.want)
            end = min(needed.stop, entry.chain.num_blocks(group))
            if end > needed.start:
                blocks = entry.chain.blocks(group, needed.start, end)
                entry.fetches += [
                    store.prefetch(blocks, holders=[entry.holder]) for store in self._stores(group)
                ]

    def _has_last(self, entry: _Lookup) -> bool:
        """Whether the last wanted block of every group and rank is there: what is saved last."""
        for group in self._groups:
            count = min(entry.want // group.block_tokens, entry.chain.num_blocks(group))
            if count == 0:
                continue
            last = entry.chain.blocks(group, count - 1, count)
            if not all(store.contains(last).all() for store in self._stores(group)):
                return False
        return True

    def _tokens(self, chain: Chain, limit: int) -> int:
        """Ask all shards, each only for what those before it left possible."""
        end = self._whole(min(limit, len(chain) * chain.hash_tokens))
        windows = [group for group in self._groups if group.kind == "window"]
        for group in self._groups:
            if group.kind == "full":
                for store in self._stores(group) if end else ():
                    blocks = chain.blocks(group, 0, end // group.block_tokens)
                    found = store.lookup(blocks, prefetch=True).num_blocks
                    end = self._whole(min(end, found * group.block_tokens))
        if end == 0 or all(self._has_window(chain, group, end) for group in windows):
            return end
        # The last window is not whole. Which are?
        present = [self._present(chain, group, end) for group in self._groups]
        return hit_tokens(self._groups, present, end)

    def _has_window(self, chain: Chain, group: Group, end: int) -> bool:
        needed = needed_blocks(group, 0, end)
        blocks = chain.blocks(group, needed.start, needed.stop)
        return all(
            store.lookup(blocks, prefetch=True).num_blocks == len(blocks)
            for store in self._stores(group)
        )

    def _present(self, chain: Chain, group: Group, end: int) -> npt.NDArray[np.bool_]:
        """Return which of a group's blocks are in the stores of all ranks. Those of full attention
        are known to be."""
        there = np.ones(end // group.block_tokens, np.bool_)
        if group.kind == "window":
            blocks = chain.blocks(group, 0, len(there))
            for store in self._stores(group):
                there &= store.contains(blocks)
        return there

    def _stores(self, group: Group) -> Iterator[Store]:
        """Yield the stores of a group, one a rank."""
        for rank in self._shards.ranks:
            yield self._shards.store(rank, group.group_id)

    def _whole(self, tokens: int) -> int:
        """Return the tokens of a prefix that are whole blocks in every group."""
        return max(0, tokens) // self._step * self._step
