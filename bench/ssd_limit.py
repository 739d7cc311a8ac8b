"""How near does the SSD tier come to what the disk gives?

1 MiB blocks, written in sequence and read at random, beside fio with the same engine, depth, block
size and file system.

    python bench/ssd_limit.py [--json] [--path DIR] [--mebibytes N]

Ours and fio alternate, so that a disk whose speed drifts treats both alike; the ratio is that of
the medians. Without fio, the bare IoQueue on a preallocated file stands in for it.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.tiers.ssd import SsdConfig, SsdTier

BLOCK_BYTES = 1 << 20
DEPTH = 16
ROUNDS = 5


class Blocks:
    """Page-aligned random blocks, as many as one write call gets."""

    def __init__(self, count: int) -> None:
        raw = np.empty(count * BLOCK_BYTES + 4096, np.uint8)
        start = -raw.ctypes.data % 4096
        self.bytes = raw[start : start + count * BLOCK_BYTES].reshape(count, BLOCK_BYTES)
        self.bytes[:] = np.random.default_rng(0).integers(0, 256, self.bytes.shape, np.uint8)
        self.addrs: npt.NDArray[np.uint64] = np.uint64(self.bytes.ctypes.data) + np.arange(
            count, dtype=np.uint64
        ) * np.uint64(BLOCK_BYTES)
        self.sizes = np.full(count, BLOCK_BYTES, np.uint32)
        self.checksums = _native.io_checksum_at(self.addrs, self.sizes.astype(np.uint64))


def ours(directory: Path, kind: str, mebibytes: int) -> tuple[float, float]:
    """(write, read) in bytes per second: durable writes in calls of 64 blocks, reads likewise."""
    path = directory / "ssd"
    blocks = Blocks(64)
    count = mebibytes // 64 * 64
    hashes = np.random.default_rng(1).integers(0, 256, (count, 32), np.uint8)
    with SsdTier(SsdConfig(path, (mebibytes + 1024) << 20, io=kind, io_depth=DEPTH)) as tier:
        namespace = tier.register_namespace(b"bench", b"")
        at = []
        begin = time.perf_counter()
        for start in range(0, count, 64):
            part = hashes[start : start + 64]
            at.append(
                tier.write(
                    namespace,
                    part,
                    part,
                    np.zeros(64, np.uint32),
                    blocks.addrs,
                    blocks.sizes,
                    blocks.checksums,
                    durable=start + 64 == count,
                )
            )
        write_s = time.perf_counter() - begin
        assert all(part.ok.all() for part in at)
        order = np.random.default_rng(2).permutation(count)
        segments = np.concatenate([part.segments for part in at])[order]
        pages = np.concatenate([part.pages for part in at])[order]
        checksums = np.concatenate([part.stored_checksums for part in at])[order]
        begin = time.perf_counter()
        for start in range(0, count, 64):
            span = slice(start, start + 64)
            ok = tier.read(segments[span], pages[span], blocks.sizes, checksums[span], blocks.addrs)
            assert ok.all()
        read_s = time.perf_counter() - begin
    shutil.rmtree(path)
    return count * BLOCK_BYTES / write_s, count * BLOCK_BYTES / read_s


def fio(directory: Path, kind: str, mebibytes: int) -> tuple[float, float]:
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
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        rates.append(float(job["write" if work == "write" else "read"]["bw_bytes"]))
    os.unlink(directory / "fio")
    return rates[0], rates[1]


def bare_queue(directory: Path, kind: str, mebibytes: int) -> tuple[float, float]:
    """Reads and writes by IoQueue alone, with neither index nor checks."""
    queue = _native.IoQueue(kind, DEPTH)
    blocks = Blocks(64)
    count = mebibytes // 64 * 64
    fd = os.open(directory / "bare", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    os.posix_fallocate(fd, 0, count * BLOCK_BYTES)
    fds = np.full(64, fd, np.int32)
    sizes = blocks.sizes.astype(np.uint64)
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(BLOCK_BYTES)
    begin = time.perf_counter()
    for start in range(0, count, 64):
        assert not queue.write(fds, offsets[start : start + 64], blocks.addrs, sizes).any()
    os.fdatasync(fd)
    write_s = time.perf_counter() - begin
    np.random.default_rng(2).shuffle(offsets)
    begin = time.perf_counter()
    for start in range(0, count, 64):
        assert not queue.read(fds, offsets[start : start + 64], blocks.addrs, sizes).any()
    read_s = time.perf_counter() - begin
    os.close(fd)
    os.unlink(directory / "bare")
    return count * BLOCK_BYTES / write_s, count * BLOCK_BYTES / read_s


def measure(directory: Path, kind: str = "auto", mebibytes: int = 1024) -> list[dict[str, Any]]:
    """Figures `ssd_write_1MiB` and `ssd_read_1MiB`, each beside the limit measured in turn."""
    kind = _native.IoQueue(kind, 1).kind
    limit = fio if shutil.which("fio") else bare_queue
    against = f"{'fio' if limit is fio else 'bare IoQueue'} {kind} depth {DEPTH}"
    mine, theirs = [], []
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        for _ in range(ROUNDS):
            theirs.append(limit(Path(scratch), kind, mebibytes))
            mine.append(ours(Path(scratch), kind, mebibytes))
    figures = []
    for i, name in enumerate(("ssd_write_1MiB", "ssd_read_1MiB")):
        value = statistics.median(rates[i] for rates in mine)
        other = statistics.median(rates[i] for rates in theirs)
        figures.append(
            {
                "name": name,
                "value": value,
                "unit": "bytes_per_second",
                "ratio": value / other,
                "against": against,
            }
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--path", type=Path, default=Path.cwd())
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--kind", default="auto", choices=["auto", "uring", "threads"])
    options = parser.parse_args()
    figures = measure(options.path, options.kind, options.mebibytes)
    if options.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        print(json.dumps({"commit": commit, "machine": platform.platform(), "figures": figures}))
        return
    for figure in figures:
        print(
            f"{figure['name']}: {figure['value'] / 1e9:.2f} GB/s, "
            f"{figure['ratio']:.2f} of {figure['against']}"
        )


if __name__ == "__main__":
    main()
