"""Real stores, small, and an engine's blocks whose bytes follow from their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kvstore
from kvstore import BlockSpec, ContiguousBlocks, Namespace
from kvstore_adapters.planning.chains import Chain
from kvstore_adapters.planning.groups import Group
from kvstore_adapters.planning.pages import HostPages
from kvstore_adapters.planning.plan import BlockMove, LoadJob, SaveJob
from kvstore_adapters.planning.shards import Shards
from kvstore_adapters.planning.transfers import Transfers
from kvstore_adapters.settings import AdapterSettings

FULL, WINDOW = Group(0, 16, "full"), Group(1, 16, "window", 33)
HYBRID = (FULL, WINDOW)
BLOCK_BYTES = 512
NUM_BLOCKS = 64  # of the engine
WAIT_S = 60.0  # a bound for what must come

Bytes = npt.NDArray[np.uint8]


def wait_until(condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.001)


def namespaces(
    num_ranks: int = 1, groups: Sequence[Group] = (FULL,)
) -> dict[tuple[int, int], Namespace]:
    return {
        (rank, group.group_id): Namespace(
            "model",
            BlockSpec.of_bytes(BLOCK_BYTES),
            layout=f"group {group.group_id}",
            tp_rank=rank,
            tp_size=num_ranks,
        )
        for rank in range(num_ranks)
        for group in groups
    }


def settings(address: str, **values: Any) -> AdapterSettings:
    return AdapterSettings(address=address, **values)


@contextlib.contextmanager
def served(directory: Path, **options: Any) -> Iterator[str]:
    """The address of a store in this process that others may connect to."""
    chosen: dict[str, Any] = {"cpu": "1MiB", "chunk": "64KiB", **options}
    address = f"unix:{directory}/s"
    with (
        kvstore.open(BlockSpec.of_bytes(BLOCK_BYTES), **chosen) as store,
        kvstore.share(store, address),
    ):
        yield address


def hashes(seed: int, count: int) -> list[bytes]:
    return [hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(count)]


def chain_of(seed: int, count: int) -> Chain:
    chain = Chain(16)
    chain.extend(hashes(seed, count))
    return chain


def content(block_hash: bytes, group_id: int = 0) -> Bytes:
    """What a block holds in these tests."""
    seed = int.from_bytes(block_hash[:8], "little") + group_id
    return np.random.default_rng(seed).integers(0, 256, BLOCK_BYTES, np.uint8)


class Memory:
    """An engine's blocks of one group."""

    def __init__(self, group_id: int = 0) -> None:
        self.group_id = group_id
        self.rows = np.zeros((NUM_BLOCKS, BLOCK_BYTES), np.uint8)
        self.pages = HostPages(ContiguousBlocks(self.rows))

    def fill(self, move: BlockMove) -> None:
        for block_id, block_hash in zip(move.block_ids, move.chain(), strict=True):
            self.rows[block_id] = content(block_hash, self.group_id)

    def holds(self, move: BlockMove, count: int | None = None) -> bool:
        pairs = list(zip(move.block_ids, move.chain(), strict=True))[:count]
        return all(
            np.array_equal(self.rows[block_id], content(block_hash, self.group_id))
            for block_id, block_hash in pairs
        )


def move(group: Group, chain: Chain, begin: int, end: int, at: int = 1) -> BlockMove:
    """Blocks [begin, end) of a chain, in the engine's blocks from `at` on."""
    blocks = chain.blocks(group, begin, end)
    return BlockMove.of(group.group_id, begin, blocks, np.arange(at, at + end - begin))


def load_job(name: str, *moves: BlockMove, is_async: bool = True) -> LoadJob:
    return LoadJob(name, list(moves), is_async)


def save_job(number: int, *moves: BlockMove, push_to: str = "") -> SaveJob:
    return SaveJob(number, f"request {number}", list(moves), push_to)


class Worker:
    """One rank: memory, stores and transfers."""

    def __init__(
        self,
        chosen: AdapterSettings,
        groups: Sequence[Group] = (FULL,),
        rank: int = 0,
        num_ranks: int = 1,
        pages: Mapping[int, Any] | None = None,
    ) -> None:
        self.memory = {group.group_id: Memory(group.group_id) for group in groups}
        self.shards = Shards(namespaces(num_ranks, groups), chosen)
        self.transfers = Transfers(
            groups,
            lambda group_id: self.shards.store(rank, group_id),
            lambda target, group_id: self.shards.push_store(target, rank, group_id),
            pages or {group_id: memory.pages for group_id, memory in self.memory.items()},
            chosen,
        )

    def save(self, number: int, *moves: BlockMove, **options: Any) -> int:
        """Save blocks that hold what they should; return how many are in the store, leading."""
        for part in moves:
            self.memory[part.group_id].fill(part)
        self.transfers.save(save_job(number, *moves, **options))
        stored: dict[int, int] = {}

        def is_reported() -> bool:
            report = self.transfers.take_report()
            assert report.saved.keys() == report.stored.keys()
            stored.update(report.stored)
            return number in stored

        wait_until(is_reported)
        return stored[number]

    def close(self) -> None:
        self.transfers.close(WAIT_S)
        self.shards.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
