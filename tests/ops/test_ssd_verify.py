"""Proves that the offline check of an SSD directory finds all damage, nothing else, and writes not.

Directories are made by the real tier: random puts, removals, reclaims and reopenings must verify
clean, and one flipped byte in anything that a store could serve (segment header, summary of live
blocks, payload, index record) must be found. Each named kind of damage has a test of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvstore
from kvstore import _native
from kvstore.errors import ConfigError, CorruptError, IncompatibleError, InUseError
from kvstore.tiers.ssd_format import PAGE_BYTES, SUPERBLOCK, Structs
from kvstore.tiers.ssd_index import keys_of
from kvstore.tiers.ssd_offline import OfflineDirectory
from kvstore.tiers.ssd_report import SsdReport
from kvstore.tiers.ssd_verify import verify_directory
from tests.ssd_support import hashes_of, keep, open_tier, write
from tests.store_support import BLOCK_BYTES, NAMESPACE, WAIT_S, chain

SMALL: dict[str, Any] = {"capacity_bytes": 1 << 20, "segment_bytes": 128 << 10}


def check(path: Path, findings_max: int = 100) -> SsdReport:
    with OfflineDirectory(path) as directory:
        return verify_directory(directory, findings_max=findings_max)


def kinds(path: Path) -> set[str]:
    return set(check(path).damage)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def live_records(path: Path) -> Structs:
    with OfflineDirectory(path) as directory:
        return np.concatenate([rows for rows, _ in directory.records()])


def segment_path(path: Path, number: int) -> Path:
    return path / "segments" / f"{number:010d}.seg"


def summary_pages(path: Path, rows: Structs) -> list[tuple[int, int]]:
    """(segment, page) of every summary page that names one of the blocks where it lies."""
    places = set(zip(rows["segment"].tolist(), rows["page"].tolist(), strict=True))
    found = []
    with OfflineDirectory(path) as directory:
        log = directory.log(_native.IoQueue("threads", 1))
        for segment in directory.segments:
            for summary in log.summaries(segment.as_segment()):
                head = summary[0]
                pages = head["blocks"]["page"][: int(head["count"])].tolist()
                if any((segment.number, page) in places for page in pages):
                    found.append((segment.number, int(head["page"])))
    return found


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    path = tmp_path / "ssd"
    with open_tier(path, **SMALL) as tier:
        for start in range(0, 120, 40):
            write(tier, list(range(start, start + 40)), 3000)
        tier.forget(np.ones(20, np.uint32), hashes_of(list(range(20))))
    return path


def tree(path: Path) -> dict[str, tuple[bytes, int]]:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def test_an_undamaged_directory_is_clean_and_untouched(golden: Path) -> None:
    before = tree(golden)
    report = check(golden)
    assert (report.num_damaged, report.findings) == (0, [])
    assert report.records == report.checked_blocks == report.decoded_blocks == 100
    assert report.checked_bytes == 100 * 3000
    assert report.live_bytes == 100 * PAGE_BYTES
    assert report.unreferenced_bytes > 20 * PAGE_BYTES
    assert tree(golden) == before


def test_a_damaged_directory_is_untouched_too(golden: Path) -> None:
    flip(golden / "index" / "data.mdb", 2 * PAGE_BYTES + 20)
    flip(segment_path(golden, 1), 100)
    before = tree(golden)
    assert check(golden).num_damaged
    assert tree(golden) == before


def test_a_flipped_payload_byte_is_found_with_its_place(golden: Path) -> None:
    row = live_records(golden)[7]
    number, page = int(row["segment"]), int(row["page"])
    flip(segment_path(golden, number), page * PAGE_BYTES + 2999, 7)
    report = check(golden)
    assert dict(report.damage) == {"payload": 1}
    assert (report.findings[0].segment, report.findings[0].page) == (number, page)
    assert row["hash"].tobytes().hex() in report.findings[0].detail


def test_a_flipped_header_is_found_and_the_blocks_are_still_checked(golden: Path) -> None:
    flip(segment_path(golden, 1), 2000)
    report = check(golden)
    assert dict(report.damage) == {"header": 1}
    assert report.checked_blocks == 100


def test_a_flipped_summary_is_found_and_its_blocks_are_still_checked(golden: Path) -> None:
    number, page = summary_pages(golden, live_records(golden))[0]
    flip(segment_path(golden, number), page * PAGE_BYTES + 500)
    report = check(golden)
    assert set(report.damage) == {"summary"}
    assert report.checked_blocks == 100


def test_a_truncated_segment_is_found(golden: Path) -> None:
    rows = live_records(golden)
    last = int(rows["page"][rows["segment"] == 1].max())
    os.truncate(segment_path(golden, 1), last * PAGE_BYTES)
    assert kinds(golden) >= {"truncated", "missing"}


def test_a_missing_segment_is_found(golden: Path) -> None:
    rows = live_records(golden)
    segment_path(golden, 1).unlink()
    report = check(golden)
    assert dict(report.damage) == {"missing": int((rows["segment"] == 1).sum())}
    assert report.findings[0].segment == 1


def test_files_of_others_are_found(golden: Path) -> None:
    (golden / "notes.txt").write_text("x")
    (golden / "segments" / "7.seg").write_text("x")
    (golden / "segments" / "0000000099.seg").write_bytes(bytes(PAGE_BYTES))
    report = check(golden)
    assert report.damage["foreign"] == 2
    assert report.damage["header"] == 1


def test_a_segment_of_another_directory_is_found(golden: Path, tmp_path: Path) -> None:
    with open_tier(tmp_path / "other", **SMALL) as tier:
        write(tier, [1], 600)
    shutil.copy(segment_path(tmp_path / "other", 1), segment_path(golden, 50))
    assert dict(check(golden).damage) == {"foreign": 1}


def test_a_damaged_index_is_found(golden: Path) -> None:
    os.truncate(golden / "index" / "data.mdb", 3 * PAGE_BYTES)
    report = check(golden)
    assert dict(report.damage) == {"index": 1}
    assert report.summaries > 0


def test_a_lost_index_is_found(golden: Path) -> None:
    shutil.rmtree(golden / "index")
    assert kinds(golden) == {"index"}


def test_a_flipped_index_record_is_found(golden: Path) -> None:
    change_in_index(golden, live_records(golden)[3:4], 60, 3)
    assert kinds(golden) >= {"index_record"}


def test_a_lost_table_of_namespaces_is_found(golden: Path) -> None:
    (golden / "namespaces.json").unlink()
    report = check(golden)
    assert dict(report.damage) == {"namespaces": 1}
    assert report.checked_blocks == 100


def test_a_damaged_superblock_is_refused(golden: Path) -> None:
    text = (golden / SUPERBLOCK).read_text()
    (golden / SUPERBLOCK).write_text(text.replace('"format": 1', '"format": 9'))
    with pytest.raises(IncompatibleError, match="format 9"):
        OfflineDirectory(golden)
    (golden / SUPERBLOCK).write_text("{")
    with pytest.raises(CorruptError, match="superblock is damaged"):
        OfflineDirectory(golden)


def test_foreign_directories_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(IncompatibleError, match="not an SSD directory of kvstore"):
        OfflineDirectory(tmp_path)
    with pytest.raises(ConfigError, match="not a directory"):
        OfflineDirectory(tmp_path / "nothing")


def test_a_store_and_a_check_exclude_each_other(golden: Path) -> None:
    with open_tier(golden, **SMALL), pytest.raises(InUseError, match=str(os.getpid())):
        OfflineDirectory(golden)
    with OfflineDirectory(golden), OfflineDirectory(golden), pytest.raises(InUseError):
        open_tier(golden, **SMALL)
    with open_tier(golden, **SMALL):
        pass


def test_nothing_stays_open_after_a_refusal(golden: Path) -> None:
    (golden / SUPERBLOCK).write_text("{")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with contextlib.suppress(CorruptError):
            OfflineDirectory(golden)
    assert len(os.listdir("/proc/self/fd")) == before
    with open(golden / "lock", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_findings_are_bounded_and_counts_are_not(golden: Path) -> None:
    for row in live_records(golden)[:20]:
        flip(segment_path(golden, int(row["segment"])), int(row["page"]) * PAGE_BYTES)
    report = check(golden, findings_max=5)
    assert len(report.findings) == 5
    assert report.damage["payload"] == 20


def test_progress_reaches_the_total(golden: Path) -> None:
    seen: list[tuple[int, int]] = []
    with OfflineDirectory(golden) as directory:
        verify_directory(directory, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (300_000, 300_000)


@pytest.mark.parametrize("codec", ["none", "zstd", "int8"])
def test_encoded_blocks_are_decoded_and_compared(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "ssd"
    hashes = chain(1, 8)
    values = np.random.default_rng(1).normal(size=(8, BLOCK_BYTES // 4)).astype(np.float32)
    with kvstore.open(
        NAMESPACE, cpu="1MiB", ssd=str(path), ssd_capacity="8MiB", ssd_segment="1MiB", codec=codec
    ) as store:
        buffers = kvstore.ContiguousBlocks(values.view(np.uint8))
        assert store.put(hashes, buffers, ack="ssd").wait(WAIT_S).ack == "ssd"
    report = check(path)
    assert (report.num_damaged, report.decoded_blocks, report.undecoded_blocks) == (0, 8, 0)


# -- any byte


def change_in_index(path: Path, row: Structs, offset: int, bit: int) -> None:
    """Flips a bit of a record (key, then value), in every copy of it that the file has."""
    key = keys_of(row)[0]
    data = bytearray((path / "index" / "data.mdb").read_bytes())
    at = data.find(key)
    assert at >= 0
    while at >= 0:
        data[at + offset] ^= 1 << bit
        at = data.find(key, at + 1)
    (path / "index" / "data.mdb").write_bytes(data)


@contextlib.contextmanager
def made(seed: int, steps: int) -> Iterator[Path]:
    """A directory after random puts, removals, reclaims and reopenings."""
    dice = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="kvstore-verify-") as root:
        path = Path(root) / "ssd"
        tier = open_tier(path, **SMALL)
        for _ in range(steps):
            numbers = dice.integers(0, 80, int(dice.integers(1, 60))).tolist()
            match int(dice.integers(0, 8)):
                case 0:
                    tier.forget(np.ones(len(numbers), np.uint32), hashes_of(numbers))
                case 1:
                    tier.reclaim(keep(float(dice.random())))
                case 2:
                    tier.close()
                    tier = open_tier(path, **SMALL)
                case _:
                    for size in (600, 4096, 5000):
                        some = [number for number in numbers if number % 3 == size % 3]
                        if some:
                            write(tier, some, size, durable=bool(dice.integers(2)))
        tier.close()
        yield path


MAKES = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@MAKES
@given(seed=st.integers(0, 1 << 32), steps=st.integers(0, 25))
def test_whatever_a_store_did_verifies_clean(seed: int, steps: int) -> None:
    with made(seed, steps) as path:
        report = check(path)
        assert report.findings == []
        assert report.checked_blocks == report.records


@MAKES
@given(seed=st.integers(0, 1 << 32), data=st.data())
def test_any_flipped_byte_of_live_data_is_found(seed: int, data: st.DataObject) -> None:
    with made(seed, 8) as path:
        with open_tier(path, **SMALL) as tier:
            write(tier, [200, 201], 700)  # never empty
        rows = live_records(path)
        row = rows[data.draw(st.integers(0, len(rows) - 1))]
        number, page = int(row["segment"]), int(row["page"])
        bit = data.draw(st.integers(0, 7))
        match data.draw(st.sampled_from(["payload", "header", "summary", "record"])):
            case "payload":
                offset = data.draw(st.integers(0, int(row["stored_bytes"]) - 1))
                flip(segment_path(path, number), page * PAGE_BYTES + offset, bit)
            case "header":
                flip(segment_path(path, number), data.draw(st.integers(0, PAGE_BYTES - 1)), bit)
            case "summary":
                pages = summary_pages(path, rows)
                number, page = pages[data.draw(st.integers(0, len(pages) - 1))]
                offset = data.draw(st.integers(0, PAGE_BYTES - 1))
                flip(segment_path(path, number), page * PAGE_BYTES + offset, bit)
            case _:
                offset = data.draw(st.integers(0, rows.dtype.itemsize - 1))
                change_in_index(path, row.reshape(1), offset, bit)
        assert check(path).num_damaged > 0
