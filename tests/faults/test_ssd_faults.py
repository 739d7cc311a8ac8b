"""A failing disk: misses and counters, never wrong bytes, exceptions, crashes or calls that hang.

A FUSE pass-through below the ssd tier fails on demand (see faultfs.py), for both kinds of I/O,
under the tier alone and under a whole store. Once a fault heals, the same store must work again.
Nothing is timed: a call with a deadline returns while the disk is still held up, or the test hangs.
Where the process could die (a failed read of mapped memory is a SIGBUS), it is a child.
"""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore import DeadlineExceededError, InUseError, Store, StoreClosedError
from kvstore.errors import OutOfSpaceError, StorageError
from kvstore.tiers import promotion
from kvstore.tiers.admission import AdmitAll, AdmitReused, SeenBlocks, TokenBucket
from kvstore.tiers.local import LocalControl, Tiers
from kvstore.tiers.ssd import SsdTier
from tests.faults.faultfs import HUNG_S, FaultyDisk, Rule, faulty_disk, missing_tools
from tests.ssd_support import (
    KINDS,
    contents,
    hash_of,
    hashes_of,
    keep,
    open_tier,
    payload_of,
    read,
    write,
)
from tests.store_support import BLOCK_BYTES, SLOTS, WAIT_S, buffers_of, chain, load, open_store, put

pytestmark = [pytest.mark.slow]

SEGMENTS = "*.seg*"
INDEX = "*data.mdb"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    missing = missing_tools()
    if missing:
        pytest.skip(missing)
    with faulty_disk(tmp_path) as disk:
        yield disk


@pytest.fixture(params=KINDS)
def tier(disk: FaultyDisk, request: pytest.FixtureRequest) -> Iterator[SsdTier]:
    with open_tier(disk.path / "ssd", request.param) as tier:
        yield tier
        disk.heal()


@pytest.fixture(params=KINDS)
def store(disk: FaultyDisk, request: pytest.FixtureRequest) -> Iterator[Store]:
    with open_store(disk.path / "ssd", ssd_io=request.param) as store:
        yield store
        disk.heal()


def exact(number: int, size: int = 5000) -> bytes:
    return payload_of(number, size).tobytes()


def check_tier(tier: SsdTier, at_least: list[int], size: int = 5000) -> None:
    """Everything there is exact or a miss; the given blocks are there; the tier takes new ones."""
    numbers = {hash_of(number): number for number in range(2000)}
    found = contents(tier)
    for block_hash, got in found.items():
        assert got is None or got == exact(numbers[block_hash], size)
    for number in at_least:
        assert found[hash_of(number)] == exact(number, size)
    at = write(tier, [1900, 1901], durable=True)
    if not at.ok.all() and tier.needs_reclaim(1):  # full, as its owner can tell
        assert tier.reclaim(keep(0.0)) is not None
        at = write(tier, [1900, 1901], durable=True)
    assert at.ok.all()
    assert read(tier, at) == [exact(1900), exact(1901)]


def tiers_of(store: Store) -> Tiers:
    control = store.control
    assert isinstance(control, LocalControl)
    return control.tiers


def evict(store: Store, seed: int = 99) -> None:
    """Make everything leave DRAM."""
    put(store, chain(seed, SLOTS))
    assert store.flush(WAIT_S)  # or its leases leave no slot to read into


def count(store: Store, name: str) -> int:
    return int(store.stats()[f"kvstore_{name}_total"])


def check_store(store: Store, disk: FaultyDisk, seed: int = 50) -> None:
    """After the disk has healed: stored, acknowledged as durable, read back."""
    disk.heal()
    assert store.flush(WAIT_S)
    hashes = chain(seed, 3)
    assert put(store, hashes, ack="durable").ack == "durable"
    evict(store, seed + 1)
    assert store.flush(WAIT_S)
    assert load(store, hashes) == 3


# -- the tier

BEFORE = list(range(1, 30))


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (Rule("write", SEGMENTS), "io_error"),
        (Rule("write", SEGMENTS, value=errno.ENOSPC), "no_space"),
        (Rule("write", SEGMENTS, skip=3, count=1), "io_error"),
        (Rule("fsync", SEGMENTS), "io_error"),
        (Rule("write", INDEX), "index_error"),
        (Rule("write", INDEX, skip=1, count=1), "index_error"),
        (Rule("write", INDEX, skip=2, count=1), "index_error"),
        (Rule("write", INDEX, value=errno.ENOSPC), "index_error"),
        (Rule("write", INDEX, skip=2, count=1, value=errno.ENOSPC), "index_error"),
        (Rule("fsync", INDEX), "index_error"),
        (Rule("fsync", INDEX, skip=1, count=1), "index_error"),
    ],
    ids=lambda value: (
        f"{value.op}-{value.match.strip('*.')}-{value.skip}-{int(value.value)}"
        if isinstance(value, Rule)
        else value
    ),
)
def test_a_failed_write_is_refused_and_the_next_one_taken(
    tier: SsdTier, disk: FaultyDisk, rule: Rule, reason: str
) -> None:
    """Among them the failed meta page: LMDB refuses everything until it is opened again."""
    assert write(tier, BEFORE).ok.all()
    disk.set(rule)
    at = write(tier, [40, 41, 42, 43], durable=True)
    assert disk.hits()[0] > 0
    assert at.reason == reason
    assert not at.ok.all()
    assert tier.counters[f"write_{reason}"] == int((~at.ok).sum())
    disk.heal()
    check_tier(tier, BEFORE)
    tier.forget(np.array([1], np.uint32), hashes_of([5]))
    assert hash_of(5) not in contents(tier)
    live = sum(segment.live_blocks for segment in tier.segments())
    assert live == len(contents(tier))


@pytest.mark.parametrize("op", ["create", "open", "fallocate", "write", "fsync", "rename"])
def test_a_segment_that_cannot_be_made_costs_the_write_only(
    tier: SsdTier, disk: FaultyDisk, op: str
) -> None:
    for error, reason in ((errno.ENOSPC, "no_space"), (errno.EIO, "io_error")):
        tier._log.seal()
        disk.set(Rule("write" if op == "write" else op, SEGMENTS, value=error))
        at = write(tier, [1, 2])
        assert at.reason == reason
        assert disk.hits()[0] > 0
        assert tier.used_bytes <= tier.capacity_bytes
    disk.heal()
    check_tier(tier, [])


@pytest.mark.parametrize(
    ("rule", "counter"),
    [
        (Rule("read", SEGMENTS), "read_io_error"),
        (Rule("read", SEGMENTS, "flip"), "read_checksum"),
        (Rule("read", SEGMENTS, "shift", 4096), "read_checksum"),
        (Rule("open", SEGMENTS), "read_io_error"),
    ],
    ids=["eio", "flip", "misdirected", "open"],
)
def test_a_failed_read_is_a_miss(tier: SsdTier, disk: FaultyDisk, rule: Rule, counter: str) -> None:
    at = write(tier, [1, 2, 3])
    with tier._log._lock:
        tier._log._close_idle_files()
        tier._log._close_if_idle(tier._log.segments[1])
    disk.set(rule)
    assert read(tier, at) == [None] * 3
    assert tier.counters[counter] == 3
    disk.heal()
    assert read(tier, at) == [exact(n) for n in (1, 2, 3)]
    check_tier(tier, [1, 2, 3])


@pytest.mark.parametrize(
    "rule",
    [
        Rule("write", SEGMENTS, "drop"),
        Rule("write", SEGMENTS, "torn", 2048),
        Rule("write", SEGMENTS, "flip"),
        Rule("write", SEGMENTS, "shift", 4096),
        Rule("write", SEGMENTS, "drop", skip=1, count=1),
        Rule("write", SEGMENTS, "shift", 8192, skip=2, count=2),
    ],
    ids=["drop", "torn", "flip", "misdirected", "drop-one", "misdirect-two"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_acknowledged_write_that_the_disk_lost_is_a_miss(
    disk: FaultyDisk, kind: str, rule: Rule
) -> None:
    with open_tier(disk.path / "ssd", kind) as tier:
        write(tier, [1, 2, 3], size=8192)
        disk.set(rule)
        write(tier, [4, 5, 6, 7], size=8192, durable=True)
        assert disk.hits()[0] > 0
        disk.heal()
        got = contents(tier)
        if rule.count < 0:  # else it may have been the summary, which only a rebuild needs
            assert any(value is None for value in got.values())
            assert tier.counters["read_checksum"] > 0
        assert all(v in (None, exact(int.from_bytes(h[:8], "big"), 8192)) for h, v in got.items())
        write(tier, [4, 5, 6, 7], size=8192)
        assert all(value is not None for value in list(contents(tier).values())[3:])
    shutil.rmtree(disk.path / "ssd" / "index")  # so that the summaries, damaged too, must do
    with open_tier(disk.path / "ssd", kind) as tier:
        for block_hash, value in contents(tier).items():
            assert value in (None, exact(int.from_bytes(block_hash[:8], "big"), 8192))


@pytest.mark.parametrize("do", ["drop", "torn", "flip", "shift"])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_an_index_whose_writes_were_lost_gives_exact_bytes(
    disk: FaultyDisk, do: str, skip: int
) -> None:
    with open_tier(disk.path / "ssd", "threads") as tier:
        write(tier, BEFORE)
        disk.set(Rule("write", INDEX, do, 4096 if do == "shift" else 100, skip=skip, count=1))
        write(tier, [40, 41])
        assert disk.hits() == [1]
        disk.heal()
        write(tier, [50, 51])
    with open_tier(disk.path / "ssd", "threads") as tier:
        check_tier(tier, [])


def test_a_segment_that_cannot_be_deleted_costs_no_other(tier: SsdTier, disk: FaultyDisk) -> None:
    """It raised from reclaim; and each further reclaim would have lost one more for no space."""
    write(tier, list(range(1, 400)), size=8000)
    before = len(tier.segments())
    assert before >= 3
    disk.set(Rule("unlink", SEGMENTS))
    assert tier.reclaim(keep(0.0)) is not None
    assert tier.reclaim(keep(0.0)) is None
    assert tier.counters["unlink_errors"] == 1
    assert len(tier.segments()) == before - 1
    disk.heal()
    assert tier.reclaim(keep(0.0)) is not None
    assert len(list((disk.below / "ssd" / "segments").iterdir())) == before - 2
    check_tier(tier, [], 8000)


@pytest.mark.parametrize(
    "rule",
    [
        Rule("read", SEGMENTS),
        Rule("read", SEGMENTS, "flip"),
        Rule("write", SEGMENTS),
        Rule("fsync", SEGMENTS),
        Rule("write", INDEX),
        Rule("write", INDEX, skip=2, count=1),
        Rule("fsync", INDEX, value=errno.ENOSPC),
    ],
    ids=lambda rule: f"{rule.op}-{rule.do}-{rule.match.strip('*.')}-{rule.skip}",
)
def test_reclaim_on_a_failing_disk_loses_blocks_at_most(
    tier: SsdTier, disk: FaultyDisk, rule: Rule
) -> None:
    write(tier, list(range(1, 400)), size=8000)
    disk.set(rule)
    tier.reclaim(keep(0.3))
    tier.reclaim(keep(0.3))
    disk.heal()
    check_tier(tier, [], 8000)
    live = sum(segment.live_blocks for segment in tier.segments())
    assert live == sum(len(batch) for batch in tier.recover())


def test_what_a_failed_sync_left_is_never_called_durable(tier: SsdTier, disk: FaultyDisk) -> None:
    """The kernel reports it once: the second sync succeeded, and promised what was lost."""
    at = write(tier, [1, 2])
    disk.set(Rule("fsync", SEGMENTS, count=1))
    with pytest.raises(StorageError):
        tier.sync()
    tier.sync()
    assert not tier.synced(at.segments).any()
    assert tier.sync_failed(at.segments).all()
    again = write(tier, [1, 2], durable=True)
    assert again.ok.all()
    assert tier.synced(again.segments).all()


@pytest.mark.parametrize("op", ["read", "write", "fsync", "open", "create", "rename", "unlink"])
def test_opening_on_a_failing_disk_is_an_error_of_ours_and_deletes_nothing(
    disk: FaultyDisk, op: str
) -> None:
    with open_tier(disk.path / "ssd", "threads") as tier:
        write(tier, BEFORE, durable=True)
    for error in (errno.EIO, errno.ENOSPC):
        for skip in range(6):
            # One failed read: LMDB's first look at a file that stays unreadable is a SIGBUS.
            disk.set(Rule(op, value=error, skip=skip, count=1 if op == "read" else -1))
            refused = contextlib.suppress(StorageError, OutOfSpaceError)
            with refused, open_tier(disk.path / "ssd", "threads") as tier:
                contents(tier)
            disk.heal()
    with open_tier(disk.path / "ssd", "threads") as tier:
        check_tier(tier, BEFORE)


def run_child(code: str, disk: FaultyDisk) -> subprocess.CompletedProcess[str]:
    script = "import os, sys\nfrom pathlib import Path\n" + code
    return subprocess.run(
        [sys.executable, "-c", script, str(disk.path.parent)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


UNREADABLE_INDEX = """
from tests.faults.faultfs import FaultyDisk, Rule
from tests.ssd_support import contents, open_tier, write
disk = FaultyDisk(Path(sys.argv[1]))
tier = open_tier(disk.path / "ssd", "threads")
write(tier, list(range(1, 300)), size=100)
tier.close()
tier = open_tier(disk.path / "ssd", "threads")
disk.set(Rule("read", "*data.mdb"))
Path("/proc/sys/vm/drop_caches").write_text("1")
assert write(tier, [400, 401], size=100).ok.all()
assert len(contents(tier)) == 301
disk.heal()
tier.close()
"""


def test_an_index_that_cannot_be_read_any_more_does_not_end_the_process(disk: FaultyDisk) -> None:
    """It was a SIGBUS as soon as the page cache had let go of a page of the index."""
    done = run_child(UNREADABLE_INDEX, disk)
    assert done.returncode == 0, done.stderr


# -- the store


@pytest.mark.parametrize("ack", ["ssd", "durable"])
@pytest.mark.parametrize(
    "rule",
    [
        Rule("write", SEGMENTS),
        Rule("create", SEGMENTS, value=errno.ENOSPC),
        Rule("write", INDEX, value=errno.ENOSPC),
        Rule("write", INDEX, skip=2, count=1),
        Rule("fsync", INDEX),
    ],
    ids=lambda rule: f"{rule.op}-{rule.match.strip('*.')}-{rule.skip}",
)
def test_a_put_whose_write_fails_reaches_memory_and_says_so(
    store: Store, disk: FaultyDisk, rule: Rule, ack: str
) -> None:
    """A put got the index's error instead, when deletions were due at the same time."""
    put(store, chain(1, 3), ack="ssd")
    store.remove(chain(1, 3)[1:2])
    tier_log(store).seal()
    disk.set(rule)
    hashes = chain(2, 4)
    result = put(store, hashes, ack=ack)
    assert result.num_stored == 4
    if disk.hits()[0] > 1:
        assert result.ack == "memory"
    assert load(store, hashes) == 4
    assert store.flush(WAIT_S)
    failed = count(store, "ssd_write_failures") + count(store, "background_errors")
    assert failed > 0
    check_store(store, disk)


def tier_log(store: Store) -> Any:
    ssd = tiers_of(store).ssd
    assert ssd is not None
    return ssd._tier._log


def test_a_durable_put_after_a_failed_sync_is_written_anew(store: Store, disk: FaultyDisk) -> None:
    """The put got an exception, and the next one of the same blocks a promise that was not kept."""
    hashes = chain(1, 3)
    assert put(store, hashes, ack="ssd").ack == "ssd"
    disk.set(Rule("fsync", SEGMENTS, count=1))
    assert put(store, hashes, ack="durable").ack == "memory"
    assert count(store, "background_errors") == 1
    written = count(store, "ssd_written_bytes")
    assert put(store, hashes, ack="durable").ack == "durable"
    assert count(store, "ssd_written_bytes") > written
    check_store(store, disk)


def test_removed_blocks_stay_removed_though_the_index_failed(disk: FaultyDisk) -> None:
    """What could not be deleted at once was never tried again and came back at the next start."""
    hashes = chain(1, 4)
    with open_store(disk.path / "ssd") as store:
        put(store, hashes, ack="ssd")
        disk.set(Rule("write", INDEX))
        store.remove(hashes[1:2])
        assert store.flush(WAIT_S)
        assert count(store, "background_errors") > 0
        disk.heal()
        put(store, chain(2, 2), ack="ssd")
    with open_store(disk.path / "ssd") as store:
        assert store.match(hashes) == 1


@pytest.mark.parametrize(
    ("rule", "is_integrity"),
    [
        (Rule("read", SEGMENTS), False),
        (Rule("read", SEGMENTS, "flip"), True),
        (Rule("read", SEGMENTS, "shift", 4096), True),
    ],
    ids=["eio", "flip", "misdirected"],
)
def test_a_load_from_a_failing_disk_is_a_miss_and_counted(
    store: Store, disk: FaultyDisk, rule: Rule, is_integrity: bool
) -> None:
    """Failed checksums were counted by the tier only, not as kvstore_integrity_failures_total."""
    hashes = chain(1, 3)
    put(store, hashes, ack="ssd")
    evict(store)
    disk.set(rule)
    assert load(store, hashes) == 0
    assert count(store, "ssd_read_failures") == 3
    assert count(store, "integrity_failures") == (3 if is_integrity else 0)
    assert count(store, "missed_blocks") >= 3
    disk.heal()
    assert put(store, hashes, ack="ssd").ack == "ssd"
    check_store(store, disk)


def test_a_full_disk_costs_no_put_and_no_load(store: Store, disk: FaultyDisk) -> None:
    """With room again, it lost a whole segment for the space that it had once lacked; and what was
    being written leased so much of DRAM that puts were refused."""
    put(store, chain(1, 3), ack="ssd")
    disk.set(
        Rule("write", value=errno.ENOSPC),
        Rule("create", value=errno.ENOSPC),
        Rule("fallocate", value=errno.ENOSPC),
    )
    for seed in range(2, 12):
        assert put(store, chain(seed, 5)).num_stored == 5
        assert load(store, chain(seed, 5)) == 5
    assert store.flush(WAIT_S)
    check_store(store, disk)


# -- a disk that does not answer


def test_no_call_waits_longer_than_its_deadline_for_a_hung_read(
    store: Store, disk: FaultyDisk
) -> None:
    hashes, other = chain(1, 3), chain(2, 3)
    put(store, hashes, ack="ssd")
    put(store, other, ack="ssd")
    evict(store)
    assert store.flush(WAIT_S)
    disk.set(Rule("read", SEGMENTS, "delay", HUNG_S))
    assert load(store, hashes, timeout=0.1) == 0
    assert count(store, "deadline_exceeded") == 1
    assert len(store.acquire(other, timeout=0.1)) == 0
    with pytest.raises(DeadlineExceededError):
        store.prefetch(other).wait(0.0)
    assert store.lookup(hashes).num_blocks >= 0
    assert store.stats()["kvstore_deadline_exceeded_total"] == 2
    for seed in range(3, 8):
        assert put(store, chain(seed, 2)).num_stored == 2
        assert load(store, chain(seed, 2)) == 2
    check_store(store, disk)
    assert load(store, other) == 3


def test_a_disk_known_to_hang_is_not_waited_for(
    store: Store, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every load waited for its whole deadline as long as the disk hung."""
    hashes, other = chain(1, 3), chain(2, 3)
    put(store, hashes, ack="ssd")
    put(store, other, ack="ssd")
    evict(store)
    assert store.flush(WAIT_S)
    disk.set(Rule("read", SEGMENTS, "delay", HUNG_S))
    assert load(store, hashes, timeout=0.1) == 0
    monkeypatch.setattr(promotion, "STUCK_SECONDS", 0.0)
    assert load(store, other, timeout=HUNG_S) == 0
    monkeypatch.undo()
    check_store(store, disk)


@pytest.mark.parametrize("op", ["write", "fsync"])
@pytest.mark.parametrize("match", [SEGMENTS, INDEX])
def test_a_hung_write_holds_up_no_put_and_no_load(
    store: Store, disk: FaultyDisk, op: str, match: str
) -> None:
    disk.set(Rule(op, match, "delay", HUNG_S))
    promised = store.put(chain(1, 2), _buffers(1, 2), ack="durable")
    for seed in range(2, 8):
        assert put(store, chain(seed, 2)).num_stored == 2
        assert load(store, chain(seed, 2)) == 2
    assert not store.flush(0.1)
    with pytest.raises(DeadlineExceededError):
        promised.wait(0.1)
    assert store.stats()["kvstore_write_behind_bytes"] > 0
    disk.heal()
    assert promised.wait(WAIT_S).ack == "durable"
    check_store(store, disk)


@pytest.mark.parametrize("admission", ["all", "reuse"])
def test_a_full_disk_spends_no_budget(disk: FaultyDisk, admission: str) -> None:
    """What could not be written goes back to the budget, and is written once there is room."""
    with open_store(disk.path / "ssd", ssd_admission=admission, ssd_write_budget="1GiB") as store:
        ssd = tiers_of(store).ssd
        assert ssd is not None
        bucket = TokenBucket(0.001, 6 * BLOCK_BYTES, lambda: 0.0)
        seen = SeenBlocks(1 << 12)
        ssd.admission = AdmitAll(bucket, seen) if admission == "all" else AdmitReused(bucket, seen)
        hashes = chain(1, 3)
        disk.set(Rule("write", SEGMENTS, value=errno.ENOSPC))
        for _ in range(5):
            put(store, hashes)
            assert load(store, hashes) == 3
            assert store.flush(WAIT_S)
        assert count(store, "ssd_write_failures") > 0
        assert bucket.level == bucket.burst
        disk.heal()
        assert load(store, hashes) == 3
        assert store.flush(WAIT_S)
        assert (store.control.residency(hashes) == 3).all()
        assert bucket.level == bucket.burst / 2


def test_a_hung_disk_puts_bursts_off_and_takes_them_later(disk: FaultyDisk) -> None:
    with open_store(disk.path / "ssd", write_behind=2 * BLOCK_BYTES) as store:
        disk.set(Rule("write", SEGMENTS, "delay", HUNG_S))
        chains = [chain(seed, 2) for seed in range(1, 6)]
        for hashes in chains:
            assert put(store, hashes).num_stored == 2
        assert count(store, "write_behind_deferred_blocks") >= 6
        assert not store.flush(0.0)
        disk.heal()
        assert store.flush(WAIT_S)
        for hashes in chains:
            assert (store.control.residency(hashes) == 3).all()


def _buffers(seed: int, num_blocks: int) -> Any:
    return buffers_of(chain(seed, num_blocks))


@pytest.mark.parametrize("op", ["read", "write", "open"])
@pytest.mark.parametrize("kind", KINDS)
def test_close_leaves_a_hung_disk_behind(disk: FaultyDisk, kind: str, op: str) -> None:
    """It waited for ever: for the promotion's thread, the tier's readers, its writer."""
    store = open_store(disk.path / "ssd", ssd_io=kind)
    hashes = chain(1, 3)
    put(store, hashes, ack="ssd")
    evict(store)
    assert store.flush(WAIT_S)
    log = tier_log(store)
    with log._lock:
        for segment in log.segments.values():
            log._close_if_idle(segment)
    disk.set(Rule(op, SEGMENTS, "delay", HUNG_S))
    promised = store.put(chain(5, 2), _buffers(5, 2), ack="ssd", background=True)
    load(store, hashes, timeout=0.1)
    store.close(timeout=0.2)
    if op == "write":
        with pytest.raises(StoreClosedError):
            promised.wait(WAIT_S)
    with pytest.raises(InUseError):
        open_store(disk.path / "ssd")
    disk.heal()
    for thread in threading.enumerate():
        if thread.name.startswith("kvstore-"):
            thread.join(WAIT_S)
    with open_store(disk.path / "ssd") as again:
        assert load(again, hashes) == 3


HUNG_AT_EXIT = """
from tests.faults.faultfs import FaultyDisk, HUNG_S, Rule
from tests.store_support import SLOTS, chain, load, open_store, put
disk = FaultyDisk(Path(sys.argv[1]))
store = open_store(disk.path / "ssd")
put(store, chain(1, 3), ack="ssd")
put(store, chain(2, SLOTS), ack="ssd")
disk.set(Rule("read", "*.seg", "delay", HUNG_S))
assert load(store, chain(1, 3), timeout=0.1) == 0
store.close(timeout=0.1)
print("closed", flush=True)
"""


def test_a_hung_disk_does_not_keep_the_interpreter_from_its_exit(disk: FaultyDisk) -> None:
    """Where the kernel lets the process go at all, as FUSE does with threads."""
    script = "import os, sys\nfrom pathlib import Path\n" + HUNG_AT_EXIT
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(disk.path.parent)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"closed\n"
        # An exiting process waits in the kernel for its uninterruptible reads, ours included:
        # past the interpreter's own exit it has no threads of Python's left to join.
        disk.heal()
        assert child.wait(WAIT_S) == 0
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


# -- a real file system that is full


def test_a_full_file_system_costs_no_put_and_no_load(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    small = tmp_path / "small"
    small.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)]
    if subprocess.run(mounting, check=False, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a tmpfs")
    try:
        filler = small / "filler"
        with open_store(small / "ssd", ssd_capacity="64MiB") as store:
            for seed in range(30):
                assert put(store, chain(seed, 5)).num_stored == 5
                assert load(store, chain(seed, 5)) == 5
                for other in range(seed):
                    load(store, chain(other, 5))
            assert store.flush(WAIT_S)
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while file.write(bytes(65536)):
                    pass
            for seed in range(30, 40):
                assert put(store, chain(seed, 5), ack="ssd").num_stored == 5
                assert load(store, chain(seed, 5)) == 5
            ssd = tiers_of(store).ssd
            assert ssd is not None
            assert ssd._tier.counters["write_no_space"] > 0
            filler.unlink()
            assert put(store, chain(60, 3), ack="durable").ack == "durable"
            evict(store)
            assert load(store, chain(60, 3)) == 3
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)
