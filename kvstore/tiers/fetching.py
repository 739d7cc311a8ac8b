"""What the tiers ask of whoever brings blocks from other daemons; see `kvstore.peers`."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from kvstore.block import BlockHashes, Namespace
from kvstore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Wanted:
    """A chain of blocks, and whose."""

    number: int  # of the namespace, in the core of this process
    namespace: Namespace
    tenant: str
    hashes: BlockHashes


class Fetches(Protocol):
    def fetch(self, wanted: Wanted, holders: list[str], timeout: float) -> Future[int]:
        """Bring leading blocks that no tier has here from `holders`.

        Returns:
            How many leading blocks are in some tier then. It never fails, and nobody has to wait
            for it.

        Raises:
            ConfigError: there are no peers.
        """
        ...

    def close(self, timeout: float) -> None: ...


class NoPeers:
    """Of a store that was given no secret of peers."""

    def fetch(self, wanted: Wanted, holders: list[str], timeout: float) -> Future[int]:
        raise ConfigError("holders: this store has no peers; set peer_token")

    def close(self, timeout: float) -> None:
        pass
