"""Power loss: what write(durable=True) acknowledged is there; nothing that is there is wrong.

A writer fills a directory on a loop-mounted ext4. EXT4_IOC_SHUTDOWN without flushing the journal
stops the file system in the middle of it, as a power cut would; then the image is mounted again and
every byte is compared. Needs root and loop devices.
"""

import fcntl
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.ssd_outcome import Promises
from tests.crash.test_ssd_crash import hear_out, start
from tests.ssd_support import KINDS

pytestmark = [pytest.mark.powerloss]

EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2


class Disk:
    def __init__(self, directory: Path) -> None:
        self.image = directory / "image"
        self.mounted_at = directory / "mounted"

    def make(self) -> None:
        with open(self.image, "wb") as file:
            file.truncate(64 << 20)
        self.mounted_at.mkdir()
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m0", self.image], check=True)

    def mount(self) -> None:
        subprocess.run(
            ["mount", "-o", "loop", self.image, self.mounted_at], check=True, capture_output=True
        )

    def unmount(self) -> None:
        subprocess.run(["umount", self.mounted_at], check=True)

    def cut_power(self) -> None:
        fd = os.open(self.mounted_at, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    disk = Disk(tmp_path)
    disk.make()
    try:
        disk.mount()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot mount a loop device: {error.stderr!r}")
    yield disk
    disk.unmount()


def cycle(disk: Disk, kind: str, durable: bool, seed: int, promises: Promises) -> None:
    dice = random.Random(seed)
    writer = start(disk.mounted_at / "ssd", kind, 2 * seed + durable, [])
    assert writer.stdout is not None
    heard = ""
    for _ in range(dice.choice([1, 2, 3, 10, 30, 80])):
        heard += writer.stdout.readline()
    disk.cut_power()
    # From here on writes fail, so whatever the writer still says it acknowledged before.
    writer.kill()
    heard += hear_out(writer)
    disk.unmount()
    disk.mount()
    promises.hear(heard)
    promises.check(disk.mounted_at / "ssd", kind, miss_allowed=not durable)


def test_a_few_power_cuts(disk: Disk) -> None:
    promises = Promises()
    for seed in range(3):
        cycle(disk, "auto", True, seed, promises)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("durable", [True, False])
def test_many_power_cuts(disk: Disk, kind: str, durable: bool) -> None:
    promises = Promises()
    for seed in range(100, 120):
        cycle(disk, kind, durable, seed, promises)
