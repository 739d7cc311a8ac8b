"""How soon a daemon that was killed serves its DRAM content again, and that none of it is lost."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np

import kvstore
from kvstore.bench.report import Figure
from kvstore.bench.serving import PrivateDaemon
from kvstore.bench.timing import Scale
from kvstore.block import BlockHashes, BlockSpec, Namespace
from kvstore.errors import KVStoreError
from kvstore.store import Store

SMALL = Namespace("bench-adopt", BlockSpec(1, 1, 128, 16, "int8"))  # 4 KiB: one page
CHAIN_BLOCKS = 1000
SLOT_BYTES = SMALL.spec.block_bytes + 256  # with its header
TIMEOUT_SECONDS = 30.0


def _free_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


class _Content:
    """Chains of 1,000 blocks, no two alike, made again from their numbers."""

    def __init__(self, num_blocks: int) -> None:
        self.num_chains = num_blocks // CHAIN_BLOCKS
        random = np.random.default_rng(3)
        self.bytes = random.integers(0, 256, (CHAIN_BLOCKS, SMALL.spec.block_bytes), np.uint8)
        self.blocks = kvstore.ContiguousBlocks(self.bytes)
        self.hashes = random.integers(0, 256, (CHAIN_BLOCKS, 32), np.uint8)

    def chain(self, number: int) -> BlockHashes:
        """Also makes `bytes` those of this chain."""
        self.bytes[:, :8] = np.frombuffer(np.uint64(number).tobytes(), np.uint8)
        hashes = self.hashes.copy()
        hashes[:, :8] = self.bytes[0, :8]
        return BlockHashes.chain(hashes)

    def put_all(self, store: Store) -> None:
        for number in range(self.num_chains):
            done = store.put(self.chain(number), self.blocks).wait()
            if done.num_stored != CHAIN_BLOCKS:
                raise KVStoreError(f"only {done.num_stored} blocks of chain {number} were stored")

    def count_intact(self, store: Store) -> int:
        """How many leading blocks of all chains are there, with their bytes."""
        intact = 0
        target = np.empty_like(self.bytes)
        into = kvstore.ContiguousBlocks(target)
        for number in range(self.num_chains):
            loaded = store.load(self.chain(number), into).wait().num_blocks
            intact += int((target[:loaded] == self.bytes[:loaded]).all(axis=1).sum())
        return intact


def figure(name: str, scale: Scale, num_blocks: int) -> Figure:
    """Seconds from the start of the new process until the last chain matches whole."""
    if scale.quick:
        num_blocks //= 20
    cpu = num_blocks * SLOT_BYTES * 5 // 4 + (64 << 20)
    if cpu * 3 // 2 > _free_bytes():
        return Figure.absent(name, f"{cpu * 3 // 2 >> 20} MiB of free memory are needed")
    content = _Content(num_blocks)
    taken = []
    with (
        tempfile.TemporaryDirectory(prefix="kvstore-bench-") as directory,
        PrivateDaemon(Path(directory), cpu=str(cpu), hold_seconds="60") as daemon,
    ):
        daemon.start()
        with _connect(daemon) as store:
            content.put_all(store)
        for _ in range(scale.pick(3, 1)):
            daemon.kill()
            begin = time.perf_counter()
            daemon.start()
            with _connect(daemon) as store:
                last = store.match(content.chain(content.num_chains - 1))
                taken.append(time.perf_counter() - begin)
                if last != CHAIN_BLOCKS:
                    raise KVStoreError(f"adoption found {last} blocks of the last chain")
        with _connect(daemon) as store:
            intact = content.count_intact(store)
    if intact != num_blocks:
        raise KVStoreError(f"adoption kept {intact} of {num_blocks} blocks")
    unit = f"s for {num_blocks:,} blocks" if scale.quick else "s"
    return Figure(name, float(np.median(taken)), unit)


def _connect(daemon: PrivateDaemon) -> Store:
    return kvstore.connect(daemon.address, SMALL, timeout=TIMEOUT_SECONDS)
