"""Shards: the stores in which the blocks of one model lie, one a rank and group.

A model that runs on several ranks has as many shards of every block. The scheduler looks into all
of them; a worker opens its own rank's only.

Thread safety: all methods may be called from any thread. `_lock` guards `_stores` and `_is_closed`;
connecting is done outside of it, as it may take `settings.timeout`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import kvstore
from kvstore import ConfigError, Namespace, Store, StoreClosedError
from kvstore_adapters.settings import AdapterSettings

_Key = tuple[str, int, int]  # address, rank, group


class Shards:
    """Stores are connected when first asked for, and stay until `close`."""

    def __init__(
        self, namespaces: Mapping[tuple[int, int], Namespace], settings: AdapterSettings
    ) -> None:
        """`namespaces`: by (rank, group). Raises ConfigError when there are none."""
        if not namespaces:
            raise ConfigError("namespaces: a model has at least one rank and group")
        self._settings = settings
        self._namespaces = dict(namespaces)
        self.ranks = _distinct_ranks(namespaces)
        self._stores: dict[_Key, Store] = {}
        self._is_closed = False
        self._lock = threading.Lock()

    def namespace(self, rank: int, group_id: int) -> Namespace:
        """Raises KeyError: no such shard."""
        return self._namespaces[rank, group_id]

    def adopt(self, namespaces: Mapping[tuple[int, int], Namespace]) -> None:
        """Take other namespaces, as where workers say what theirs are. Stores that are not of one
        of them are closed."""
        if not namespaces:
            return
        with self._lock:
            former, self._namespaces = self._namespaces, dict(namespaces)
            self.ranks = _distinct_ranks(namespaces)
            gone = [key for key in self._stores if former.get(key[1:]) != namespaces.get(key[1:])]
            stores = [self._stores.pop(key) for key in gone]
        for store in stores:
            store.close(0.0)

    def connect_all(self) -> None:
        """Connect every shard now, when somebody reads the errors. A daemon that is away is none.

        Raises:
            ConfigError, IncompatibleError: the daemon is there, and refuses us.
        """
        for rank, group_id in tuple(self._namespaces):
            self.store(rank, group_id)

    def store(self, rank: int, group_id: int) -> Store:
        """Return the store of one shard. May take `settings.timeout` the first time.

        Raises:
            KeyError: there is no such shard.
            ConfigError, IncompatibleError: the daemon is there, and refuses us.
            StoreClosedError: after `close`.
        """
        return self._connected((self._settings.address, rank, group_id))

    def push_store(self, target: str, rank: int, group_id: int) -> Store:
        """Return the shard's store at one of `settings.push_targets`. Raises as `store` does.

        Raises:
            ConfigError: no such target.
        """
        address = self._settings.push_targets.get(target)
        if address is None:
            raise ConfigError(f"push_targets: has no {target!r}")
        return self._connected((address, rank, group_id))

    def clear(self) -> None:
        """Remove all blocks of all shards, from our own daemon only.

        Raises:
            PeerUnavailableError, DeadlineExceededError: the daemon is away.
        """
        for rank, group_id in tuple(self._namespaces):
            self.store(rank, group_id).clear()

    def close(self, timeout: float = 5.0) -> None:
        """Takes `timeout` in all. Safe to call twice."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._is_closed = True
            stores, self._stores = list(self._stores.values()), {}
        for store in stores:
            store.close(max(0.0, deadline - time.monotonic()))

    def _connected(self, key: _Key) -> Store:
        with self._lock:
            store = self._stores.get(key)
            is_closed = self._is_closed
        if is_closed:
            raise StoreClosedError("the shards are closed")
        return store if store is not None else self._connect(key)

    def _connect(self, key: _Key) -> Store:
        settings = self._settings
        namespace = self._namespaces[key[1:]]
        made = kvstore.connect(
            key[0],
            namespace,
            timeout=settings.timeout,
            token=Path(settings.token_file) if settings.token_file else None,
            tenant=settings.tenant,
            required=False,
            tls=settings.tls_for(key[0]),
        )
        with self._lock:
            is_of_use = not self._is_closed and self._namespaces.get(key[1:]) == namespace
            kept = self._stores.setdefault(key, made) if is_of_use else made
        if not is_of_use or kept is not made:
            made.close(0.0)  # we came too late, or another thread was first
        if not is_of_use:
            raise StoreClosedError("the shards were closed, or their namespaces changed")
        return kept


def _distinct_ranks(namespaces: Mapping[tuple[int, int], Namespace]) -> tuple[int, ...]:
    """Of ranks that hold the same blocks the first only."""
    by_rank: dict[int, list[tuple[int, bytes]]] = {}
    for (rank, group_id), namespace in sorted(namespaces.items(), key=lambda item: item[0]):
        by_rank.setdefault(rank, []).append((group_id, namespace.digest))
    first = {tuple(shards): rank for rank, shards in reversed(by_rank.items())}
    return tuple(sorted(first.values()))
