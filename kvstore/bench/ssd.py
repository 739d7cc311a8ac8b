"""The ssd tier beside the disk's own limit, and how fast a directory with many blocks opens.

1 MiB blocks are written in sequence and read at random, beside fio with the same engine, depth,
block size and file system. Ours and fio take turns, so that a disk whose speed drifts treats both
alike. Without fio, the bare IoQueue on a preallocated file stands in for it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

import kvstore
from kvstore import _native
from kvstore.bench.report import Figure
from kvstore.bench.timing import Scale, median, speedup
from kvstore.block import BlockSpec, Namespace
from kvstore.errors import ConfigError, KVStoreError
from kvstore.tiers.ssd import SsdConfig, SsdTier

Rates = tuple[float, float]  # of writing and reading, in bytes per second

BLOCK_BYTES = 1 << 20
DEPTH = 16
CALL_BLOCKS = 64  # blocks in one call of the tier
SMALL = Namespace("bench", BlockSpec(1, 1, 128, 16, "int8"))  # 4 KiB: one page
CHAIN_BLOCKS = 1000


class Blocks:
    """Random blocks, as many as one call gets, in an arena, as the store's are.

    In memory of one's own the figures would depend on how scattered its pages happen to be: direct
    I/O of 1 MiB from 4 KiB pages is half as fast as from huge ones.
    """

    def __init__(self, count: int, block_bytes: int) -> None:
        arena = _native.StoreCore(count * block_bytes, count * block_bytes, False, "lru").arena
        self.bytes = arena[4096 : 4096 + count * block_bytes].reshape(count, block_bytes)
        self.bytes[:] = np.random.default_rng(0).integers(0, 256, self.bytes.shape, np.uint8)
        self.addrs: npt.NDArray[np.uint64] = np.uint64(self.bytes.ctypes.data) + np.arange(
            count, dtype=np.uint64
        ) * np.uint64(block_bytes)
        self.sizes = np.full(count, block_bytes, np.uint32)
        self.checksums = _native.io_checksum_at(self.addrs, self.sizes.astype(np.uint64))


def ours(directory: Path, kind: str, mebibytes: int) -> Rates:
    """Writes in calls of 64 blocks, the last one durable; reads likewise."""
    path = directory / "ssd"
    blocks = Blocks(CALL_BLOCKS, BLOCK_BYTES)
    count = mebibytes // CALL_BLOCKS * CALL_BLOCKS
    hashes = np.random.default_rng(1).integers(0, 256, (count, 32), np.uint8)
    with SsdTier(SsdConfig(path, (mebibytes + 1024) << 20, io=kind, io_depth=DEPTH)) as tier:
        namespace = tier.register_namespace(b"bench", b"")
        at = []
        begin = time.perf_counter()
        for start in range(0, count, CALL_BLOCKS):
            part = hashes[start : start + CALL_BLOCKS]
            at.append(
                tier.write(
                    namespace,
                    part,
                    part,
                    np.zeros(CALL_BLOCKS, np.uint32),
                    blocks.addrs,
                    blocks.sizes,
                    blocks.checksums,
                    durable=start + CALL_BLOCKS == count,
                )
            )
        write_s = time.perf_counter() - begin
        assert all(part.ok.all() for part in at)
        order = np.random.default_rng(2).permutation(count)
        segments = np.concatenate([part.segments for part in at])[order]
        pages = np.concatenate([part.pages for part in at])[order]
        checksums = np.concatenate([part.stored_checksums for part in at])[order]
        begin = time.perf_counter()
        for start in range(0, count, CALL_BLOCKS):
            span = slice(start, start + CALL_BLOCKS)
            ok = tier.read(segments[span], pages[span], blocks.sizes, checksums[span], blocks.addrs)
            assert ok.all()
        read_s = time.perf_counter() - begin
    shutil.rmtree(path)
    return count * BLOCK_BYTES / write_s, count * BLOCK_BYTES / read_s


def fio(directory: Path, kind: str, mebibytes: int) -> Rates:
    """The same by fio; its write ends with a sync as ours does."""
    engine = ["--ioengine=io_uring", "--fixedbufs"]  # without it fio's reads are half as fast
    if kind == "threads":
        engine = ["--ioengine=psync", "--thread", f"--numjobs={DEPTH}", "--group_reporting"]
    size = mebibytes << 20
    per_job = size // DEPTH if kind == "threads" else size
    rates = []
    for work in ("write", "randread"):
        command = ["fio", "--name=limit", f"--filename={directory / 'fio'}", f"--rw={work}"]
        command += ["--bs=1M", f"--iodepth={DEPTH}", "--direct=1", "--output-format=json"]
        command += [f"--size={per_job}", "--end_fsync=1", "--randrepeat=1", *engine]
        command += [f"--offset_increment={per_job}"] if kind == "threads" else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise KVStoreError(f"fio failed: {done.stderr.strip()[-300:]}")
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        rates.append(float(job["write" if work == "write" else "read"]["bw_bytes"]))
    os.unlink(directory / "fio")
    return rates[0], rates[1]


def bare_queue(directory: Path, kind: str, mebibytes: int) -> Rates:
    """The same by IoQueue alone, with neither index nor checks."""
    queue = _native.IoQueue(kind, DEPTH)
    blocks = Blocks(CALL_BLOCKS, BLOCK_BYTES)
    count = mebibytes // CALL_BLOCKS * CALL_BLOCKS
    fd = os.open(directory / "bare", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    os.posix_fallocate(fd, 0, count * BLOCK_BYTES)
    fds = np.full(CALL_BLOCKS, fd, np.int32)
    sizes = blocks.sizes.astype(np.uint64)
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(BLOCK_BYTES)
    begin = time.perf_counter()
    for start in range(0, count, CALL_BLOCKS):
        assert not queue.write(fds, offsets[start : start + CALL_BLOCKS], blocks.addrs, sizes).any()
    os.fdatasync(fd)
    write_s = time.perf_counter() - begin
    np.random.default_rng(2).shuffle(offsets)
    begin = time.perf_counter()
    for start in range(0, count, CALL_BLOCKS):
        assert not queue.read(fds, offsets[start : start + CALL_BLOCKS], blocks.addrs, sizes).any()
    read_s = time.perf_counter() - begin
    os.close(fd)
    os.unlink(directory / "bare")
    return count * BLOCK_BYTES / write_s, count * BLOCK_BYTES / read_s


def _check_room(directory: Path, need_bytes: int) -> None:
    if not directory.is_dir():
        raise ConfigError(f"ssd: {directory} is not a directory")
    free = shutil.disk_usage(directory).free
    if free < need_bytes:
        raise ConfigError(f"ssd: {directory} has {free >> 20} MiB free, {need_bytes >> 20} needed")


def disk_figures(
    directory: Path, kind: str = "auto", mebibytes: int = 1024, rounds: int = 5
) -> list[Figure]:
    """`ssd_write_1MiB` and `ssd_read_1MiB`, each beside the limit measured in turn."""
    mebibytes = max(CALL_BLOCKS, mebibytes)
    _check_room(directory, 3 * mebibytes << 20)
    kind = _native.IoQueue(kind, 1).kind
    limit: Callable[[Path, str, int], Rates] = fio if shutil.which("fio") else bare_queue
    limit_name = f"{'fio' if limit is fio else 'bare IoQueue'}, {kind}, depth {DEPTH}"
    mine: list[Rates] = []
    theirs: list[Rates] = []
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=directory) as scratch:
        for number in range(rounds):
            for measure, rates in ((limit, theirs), (ours, mine))[:: 1 if number % 2 else -1]:
                rates.append(measure(Path(scratch), kind, mebibytes))
    figures = []
    for i, name in enumerate(("write", "read")):
        seconds, limit_seconds = (
            1 / np.array([rates[i] for rates in taken]) for taken in (mine, theirs)
        )
        figures.append(
            Figure(f"disk_{name}", 1e-9 / median(limit_seconds), "GB/s", None, limit_name)
        )
        ratio = speedup(seconds, limit_seconds)
        figures.append(
            Figure(f"ssd_{name}_1MiB", 1e-9 / median(seconds), "GB/s", ratio, limit_name)
        )
    return figures


def limits(scale: Scale, directory: Path) -> list[Figure]:
    return disk_figures(directory, mebibytes=scale.pick(1024, CALL_BLOCKS), rounds=scale.pick(5, 2))


def _write_small_blocks(path: Path, count: int) -> None:
    """A directory as a store leaves it: chains of 1,000 blocks of one page."""
    random = np.random.default_rng(0)
    blocks = Blocks(CHAIN_BLOCKS, SMALL.spec.block_bytes)
    depths = np.arange(1, CHAIN_BLOCKS + 1, dtype=np.uint32)
    description = json.dumps(SMALL.describe(), sort_keys=True).encode()
    with SsdTier(SsdConfig(path, _capacity(count))) as tier:
        namespace = tier.register_namespace(SMALL.digest, description)
        for _ in range(0, count, CHAIN_BLOCKS):
            hashes = random.integers(0, 256, (CHAIN_BLOCKS, 32), np.uint8)
            parents = np.concatenate((np.zeros((1, 32), np.uint8), hashes[:-1]))
            written = tier.write(
                namespace,
                hashes,
                parents,
                depths,
                blocks.addrs,
                blocks.sizes,
                blocks.checksums,
                durable=False,
            )
            assert written.ok.all()


def _capacity(blocks: int) -> int:
    return blocks * SMALL.spec.block_bytes * 2 + (1 << 30)


def recovery(scale: Scale, directory: Path) -> list[Figure]:
    """Time from `kvstore.open` of a directory until its blocks can be matched."""
    count, rounds = scale.pick(100_000, 5_000), scale.pick(5, 2)
    _check_room(directory, 2 * _capacity(count))
    taken = np.empty(rounds)
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=directory) as scratch:
        path = Path(scratch) / "ssd"
        _write_small_blocks(path, count)
        for number in range(rounds):
            begin = time.perf_counter()
            store = kvstore.open(SMALL, cpu="16MiB", ssd=str(path), ssd_capacity=_capacity(count))
            taken[number] = time.perf_counter() - begin
            found = store.stats()["kvstore_ssd_blocks"]
            store.close()
            if found != count:
                raise KVStoreError(f"recovery found {found} of {count} blocks")
    unit = f"s for {count:,} blocks" if scale.quick else "s"
    return [Figure("recover_100k_blocks_s", median(taken), unit)]
