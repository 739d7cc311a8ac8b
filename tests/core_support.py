"""Blocks whose bytes follow from their name, put into a bare core: shared by tests of adoption."""

import hashlib
import mmap
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore import ContiguousBlocks, _native

PAGE = 4096
HEADER_BYTES = 128
# Offsets in a slot header (csrc/core/arena_format.h).
SEQUENCE, CHECKSUM, STORED_ID, DEPTH, HASH, PARENT, SEAL, WRITER = 0, 16, 24, 28, 32, 64, 96, 104


def hash_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def rows(names: list[str]) -> npt.NDArray[np.uint8]:
    raw = b"".join(hash_of(name) for name in names)
    return np.frombuffer(raw, np.uint8).reshape(len(names), 32)


def payload(name: str, size: int, salt: int = 0) -> npt.NDArray[np.uint8]:
    seed = int.from_bytes(hash_of(name)[:8], "little")
    return np.random.default_rng([seed, size, salt]).integers(0, 256, size, dtype=np.uint8)


def chain(prefix: str, n: int) -> list[str]:
    return [f"{prefix}{i}" for i in range(n)]


@dataclass
class View:
    """One core, seen by the tests. `keep` is a descriptor that outlives it, as a holder's does."""

    core: _native.StoreCore
    keep: int

    @classmethod
    def create(cls, num_bytes: int = 1 << 20, chunk: int = 1 << 16, policy: str = "lru") -> "View":
        core = _native.StoreCore(num_bytes, chunk, False, policy)
        return cls(core, os.dup(core.arena_fd))

    def die(self) -> int:
        """Drop the core as a kill would: nothing is told to it. Returns the arena's descriptor."""
        del self.core
        return self.keep

    def put(
        self,
        names: list[str],
        namespace: int = 0,
        start: int = 0,
        parent: str | None = None,
        owner: int | None = None,
        salt: int = 0,
    ) -> int:
        size = self.core.block_bytes(namespace)
        data = np.stack([payload(name, size, salt) for name in names])
        return self.core.put(
            self.core.new_owner() if owner is None else owner,
            namespace,
            rows(names),
            start,
            None if parent is None else hash_of(parent),
            ContiguousBlocks(data).plan,
            np.arange(len(names)),
            1,
        )[1]

    def load(self, names: list[str], namespace: int = 0, salt: int = 0) -> int:
        """How many leading blocks can be had; their bytes are compared."""
        size = self.core.block_bytes(namespace)
        room = np.zeros((len(names), size), np.uint8)
        loaded, _ = self.core.load(
            self.core.new_owner(),
            namespace,
            rows(names),
            ContiguousBlocks(room).plan,
            np.arange(len(names)),
            False,
            1,
        )
        for row, name in zip(room[:loaded], names, strict=False):
            assert (row == payload(name, size, salt)).all(), name
        return loaded

    def header_of(self, name: str, namespace: int = 0) -> int:
        owner = self.core.new_owner()
        lease, _, headers, _, _ = self.core.acquire(owner, namespace, rows([name]), None, False)
        self.core.release(owner, lease)
        return int(headers[0])

    def offset_of(self, name: str, namespace: int = 0) -> int:
        owner = self.core.new_owner()
        lease, offsets, _, _, _ = self.core.acquire(owner, namespace, rows([name]), None, False)
        self.core.release(owner, lease)
        return int(offsets[0])


def memory(fd: int) -> mmap.mmap:
    return mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED)


def flip(fd: int, offset: int, bits: int = 1) -> None:
    with memory(fd) as arena:
        arena[offset] ^= bits


def adopt(
    fd: int, block_bytes: list[int], ids: dict[int, int] | None = None, policy: str = "lru"
) -> tuple[View, dict[str, int]]:
    """What a new process does: adopt, add the namespaces, recover."""
    view = View(_native.StoreCore.adopt(fd, policy), fd)
    for size in block_bytes:
        view.core.add_namespace(size)
    same = {i: i for i in range(len(block_bytes))}
    return view, view.core.recover(same if ids is None else ids)
