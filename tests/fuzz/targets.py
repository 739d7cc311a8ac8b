"""One function for each parser that meets bytes we did not write: any bytes may come in.

A target returns normally when the parser took the input or refused it with an error of ours; any
other exception is a finding. Checksums would stop a fuzzer at the door, so where a format has them
the first byte of the input says whether they are made right before parsing: what lies behind
them must hold too, since whoever can write to the disk can compute a checksum.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvstore import _native, wire
from kvstore.block import Namespace
from kvstore.config import load_config
from kvstore.errors import ConfigError, CorruptError, IncompatibleError, KVStoreError
from kvstore.records import RECORD
from kvstore.tiers import ssd_format, ssd_open
from kvstore.tiers.segment_log import SegmentLog

UUID = bytes(range(16))
SEGMENT = 1
BLOCK_BYTES = 8192
_PAGE = ssd_format.PAGE_BYTES
_PAGES_MAX = 64
_SEGMENT_PATH_NAME = f"{SEGMENT:010d}.seg"

Target = Callable[[bytes], None]
MESSAGE_PARSERS: tuple[Callable[[bytes], object], ...] = (
    wire.decode_hello,
    wire.decode_greeting,
    wire.decode_auth,
    wire.decode_call,
    wire.decode_value,
    wire.parse_acquire,
    wire.parse_commit,
    wire.parse_quiesced,
    wire.parse_chain,
)


def segment(data: bytes) -> None:
    """A segment file: header page, summary pages; read as a rebuild of the index reads it."""
    seal, pages = data[:1] > b"\x7f", _padded(data[1 : 1 + _PAGES_MAX * _PAGE])
    if seal:
        _seal_pages(pages)
    raw = pages.tobytes()
    fault = ssd_format.header_fault(raw[:_PAGE], UUID, SEGMENT)
    assert fault in ("", "short", "damaged", "foreign")
    with tempfile.TemporaryDirectory(prefix="kv-fuzz-", dir=_fast_directory()) as directory:
        Path(directory, _SEGMENT_PATH_NAME).write_bytes(raw)
        log = SegmentLog(Path(directory), UUID, len(raw), _queue())
        try:
            log.discover(direct=False)
            known = {0: (bytes(32), b"{}")}
            rows = ssd_open.rebuilt_records(log, known, Counter())
            _check_rows(rows, len(raw) // _PAGE)
        finally:
            log.close()


def index(data: bytes) -> None:
    """Rows of the LMDB index: sound ones go into the core, which must stay usable."""
    seal, body = data[:1] > b"\x7f", data[1 : 1 + 256 * ssd_format.RECORD.itemsize]
    count = len(body) // ssd_format.RECORD.itemsize
    rows = np.frombuffer(bytearray(body), ssd_format.RECORD, count)
    if seal:
        ssd_format.seal_records(rows)
    sound = rows[ssd_format.sound_records(rows)]
    for packed in (body, data):
        ssd_open.unpack_namespace(packed)
    core = _native.StoreCore(1 << 20, 1 << 18, False, "lru")
    number = core.add_namespace(BLOCK_BYTES)
    records = np.zeros(len(sound), RECORD)
    for name in ("hash", "parent", "depth", "segment", "page", "stored_bytes", "codec", "checksum"):
        records[name] = sound[name]
    records["namespace"] = number
    restored = core.restore(records)
    assert 0 <= restored <= len(records)
    hashes = np.ascontiguousarray(records["hash"])
    if len(hashes):
        residency = core.residency(number, hashes)
        assert set(residency.tolist()) <= {0, 2}
        core.match(number, hashes, -1)
        core.describe(number, hashes)
        core.remove(number, hashes)
    core.take_garbage()
    assert core.stats()["ssd_blocks"] == 0


def superblock(data: bytes) -> None:
    """kvstore.json and namespaces.json of an ssd directory, and a namespace's description."""
    with tempfile.TemporaryDirectory(prefix="kv-fuzz-", dir=_fast_directory()) as directory:
        path = Path(directory, ssd_format.SUPERBLOCK)
        path.write_bytes(data)
        with contextlib.suppress(IncompatibleError, CorruptError):
            ssd_format.read_superblock(path)
        shutil.copy(path, Path(directory, ssd_format.NAMESPACES))
        with contextlib.suppress(ValueError):
            ssd_open.read_namespaces(Path(directory))
    with contextlib.suppress(KVStoreError, ValueError, RecursionError):
        Namespace.from_description(json.loads(data))


def config(data: bytes) -> None:
    """A configuration file."""
    with tempfile.NamedTemporaryFile(suffix=".toml", dir=_fast_directory()) as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(ConfigError):
            load_config(file.name, {})


def messages(data: bytes) -> None:
    """Bodies of control messages, from a peer that may not be ours."""
    for parse in MESSAGE_PARSERS:
        with contextlib.suppress(IncompatibleError):
            parse(data)


TARGETS: dict[str, Target] = {f.__name__: f for f in (segment, index, superblock, config, messages)}


def _fast_directory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _padded(data: bytes) -> np.ndarray:
    room = -(-max(len(data), 1) // _PAGE) * _PAGE
    return np.frombuffer(bytearray(data.ljust(room, b"\0")), np.uint8).reshape(-1, _PAGE)


def _seal_pages(pages: np.ndarray) -> None:
    """Make the checksum of every page that claims to be one of ours right, and its identity too:
    fields that are compared with what the reader knows would stop the fuzzer as checksums do."""
    for at, page in enumerate(pages):
        if at == 0:
            page[:8] = np.frombuffer(ssd_format.HEADER_MAGIC, np.uint8)
        elif bytes(page[:4]) == ssd_format.SUMMARY_MAGIC[:4]:
            summary = page.view(ssd_format.SUMMARY)
            summary["magic"] = ssd_format.SUMMARY_MAGIC
            summary["uuid"] = np.frombuffer(UUID, np.uint8)
            summary["segment"], summary["page"] = SEGMENT, at
        else:
            continue
        rows = page.reshape(1, -1)
        page[ssd_format.PAGE_CHECKED_BYTES :] = _native.io_checksum_rows(
            rows, ssd_format.PAGE_CHECKED_BYTES
        ).view(np.uint8)


def _check_rows(rows: np.ndarray, num_pages: int) -> None:
    ends = rows["page"].astype(np.int64) + ssd_format.pages_of(rows["stored_bytes"])
    assert (ends <= num_pages).all(), "a record that points behind its segment"
    assert ssd_format.sound_records(rows).all()


_queues: list[_native.IoQueue] = []


def _queue() -> _native.IoQueue:
    if not _queues:
        _queues.append(_native.IoQueue("threads", 1))
    return _queues[0]
