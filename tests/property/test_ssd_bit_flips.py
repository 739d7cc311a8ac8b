"""A flipped bit in any file of an SSD directory: right bytes, a miss or a clear error.

A child process opens the damaged directory, reads everything, writes, reclaims, verifies and opens
it again, so that a crash of native code would show as a signal. Positions are spread over every
region: superblock, namespaces, LMDB meta, branch, leaf and free pages, segment headers, summaries,
payloads and unused space.
"""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.ssd_support import hashes_of, keep, open_tier, write

BLOCKS = 300

# One child checks many positions: it forks before each, because starting Python is slow.
_CHECK = """
import os, shutil, sys
from pathlib import Path
import numpy as np
from kvstore.errors import KVStoreError
from tests.ssd_support import contents, hash_of, hashes_of, keep, open_tier, payload_of, write

golden, scratch = Path(sys.argv[1]), Path(sys.argv[2])
right = {hash_of(n): payload_of(n, 600).tobytes() for n in range(1000)}

def check(path):
    for _ in range(2):
        with open_tier(path) as tier:
            found = contents(tier)
            wrong = [k.hex() for k, v in found.items() if v is not None and v != right.get(k)]
            if wrong:
                print("WRONG", wrong[:3], flush=True)
                os._exit(3)
            for start in (500, 600, 700):
                write(tier, list(range(start, start + 80)), 600)
                tier.forget(np.ones(30, np.uint32), hashes_of(list(range(start, start + 30))))
            tier.reclaim(keep(0.5))
            list(tier.verify(repair=True))
            wrong = [k for k, v in contents(tier).items() if v is not None and v != right.get(k)]
            if wrong:
                os._exit(4)

for line in sys.stdin:
    name, offset, bit = line.split()
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(golden, scratch)
    with open(scratch / name, "r+b") as file:
        file.seek(int(offset))
        byte = file.read(1)[0]
        file.seek(int(offset))
        file.write(bytes([byte ^ (1 << int(bit))]))
    child = os.fork()
    if child == 0:
        try:
            check(scratch)
            os._exit(0)
        except KVStoreError as error:
            os._exit(0 if len(str(error)) > 20 else 5)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(6)
    status = os.waitpid(child, 0)[1]
    if status:
        print("FAILED", line.strip(), "status", status, flush=True)
        sys.exit(1)
"""


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flips") / "golden"
    with open_tier(path, capacity_bytes=4 << 20, segment_bytes=512 << 10) as tier:
        for start in range(0, BLOCKS, 50):  # several transactions leave free pages in LMDB
            write(tier, list(range(start, start + 50)), 600)
        tier.forget(np.ones(20, np.uint32), hashes_of(list(range(20))))
        tier.reclaim(keep(0.5))
    return path


def positions(path: Path, name: str, count: int) -> list[tuple[int, int]]:
    """Offsets and bits: half near the starts of pages, where structure lives."""
    size = (path / name).stat().st_size
    dice = random.Random(name)
    found = [(dice.randrange(size), dice.randrange(8)) for _ in range(count // 2)]
    for i in range(count - len(found)):
        page = i * (size // 4096) // max(1, count // 2)
        offset = min(size - 1, page * 4096 + dice.randrange(128))
        found.append((offset, dice.randrange(8)))
    return found


def check(golden: Path, scratch: Path, flips: list[tuple[str, int, int]]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CHECK, golden, scratch],
        input="".join(f"{name} {offset} {bit}\n" for name, offset, bit in flips),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def files(golden: Path) -> list[str]:
    segments = sorted(p.name for p in (golden / "segments").iterdir())
    return [
        "kvstore.json",
        "namespaces.json",
        "index/data.mdb",
        "index/lock.mdb",
        *(f"segments/{name}" for name in segments[:2]),
    ]


def test_one_flip_in_each_file(golden: Path, tmp_path: Path) -> None:
    flips = [(name, *flip) for name in files(golden) for flip in positions(golden, name, 2)]
    check(golden, tmp_path / "scratch", flips)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", range(6))
def test_flips_in_every_region(golden: Path, tmp_path: Path, file: int) -> None:
    names = files(golden)
    if file >= len(names):
        pytest.skip("no such file")
    name = names[file]
    count = 240 if name.endswith("data.mdb") else 80
    check(golden, tmp_path / "scratch", [(name, *flip) for flip in positions(golden, name, count)])
    shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
