from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

# --- hash
def hash_blocks(
    token_ids: list[int] | tuple[int, ...] | npt.NDArray[Any],
    block_tokens: int,
    parent: bytes | None,
    extra_keys: Sequence[bytes | None] | None,
    algorithm: str,
) -> npt.NDArray[np.uint8]: ...
def hash_chain_root(algorithm: str) -> bytes: ...
def cbor(value: tuple[Any, ...]) -> bytes: ...
def blake3(data: bytes, key: bytes | None = None) -> bytes: ...
def sha256(data: bytes) -> bytes: ...
def set_hash_simd_limit(level: int) -> None: ...

# --- copy
class CopyPlan:
    """Where the bytes of canonical blocks lie in an engine's tensors; checked and immutable.

    `runs` has one row a run: base address, block_stride, engine_stride, block_offset, piece_stride,
    count, bytes (csrc/copy/plan.h). They must cover [0, block_bytes) exactly once, in any order.
    The plan holds addresses only: its owner keeps the memory alive.
    """

    def __init__(
        self,
        runs: npt.NDArray[np.int64],
        block_bytes: int,
        num_blocks: int,
        *,
        writable: bool = True,
    ) -> None: ...
    @staticmethod
    def scattered(
        addresses: npt.NDArray[np.uint64], sizes: npt.NDArray[np.uint64], *, writable: bool = True
    ) -> CopyPlan:
        """Piece p of block b is sizes[p] bytes at addresses[b, p]. `runs` have base 0."""

    @property
    def block_bytes(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def writable(self) -> bool: ...
    @property
    def num_runs(self) -> int: ...
    @property
    def runs(self) -> npt.NDArray[np.int64]:
        """The merged runs, in payload order."""

    @property
    def addresses(self) -> npt.NDArray[np.uint64]:
        """Of scattered blocks, where each run of each block begins, (num_blocks, num_runs); else
        no rows."""

def xxh3(data: Buffer | npt.NDArray[Any]) -> int:
    """XXH3-64 of a contiguous buffer."""

def checksum(addr: int, bytes: int) -> int: ...
def copy_with_checksum(to: int, from_: int, bytes: int) -> int: ...
def move_pieces(
    to: npt.NDArray[np.uint64],
    from_: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.uint64],
    checksums: npt.NDArray[np.uint64] | None,
    threads: int,
    timeout: float,
    cancel: CancelFlag | None = None,
) -> npt.NDArray[np.uint8]:
    """Copy pieces of memory; return what became of each (kvstore.transport.Status)."""

def checksum_pieces(
    addresses: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint64], threads: int
) -> npt.NDArray[np.uint64]:
    """Return the XXH3-64 of each piece of memory."""

class CancelFlag:
    """Ends a move from another thread."""

    def set(self) -> None: ...
    def is_set(self) -> bool: ...

class Regions:
    """Memory of this process that peers may read, or write too, by its id."""

    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def add(self, region_id: int, address: int, num_bytes: int, writable: bool) -> None:
        """It stays mapped until `remove` returned True, or its servers are stopped."""
    def remove(self, region_id: int, timeout: float) -> bool:
        """Refuse it from now on. True: nobody moves bytes of it any more.

        Moves under way are waited for; shortly before the timeout they are cut off.
        """

class BulkServer:
    """Serves regions over TCP to those who know the secret."""

    def __init__(
        self,
        regions: Regions,
        secret: bytes,
        epoch: int,
        connections_max: int = 256,
        bytes_per_second: int = 0,
    ) -> None: ...
    def listen(self, fd: int) -> None:
        """Serve a bound, listening socket; it is duplicated."""
    def set_info(self, info: bytes) -> None:
        """What those who know the secret may ask for."""
    def counters(self) -> dict[str, int]: ...
    def stop(self) -> None: ...

class BulkLink:
    """Moves pieces to and from the regions of a peer's BulkServer.

    Raises:
        TimeoutError: no connection in time.
        ConnectionError: nobody is there.
        RemoteError: the peer has another secret, epoch or version.
        ProtocolError: it is no peer of ours.
    """

    def __init__(
        self, address: str, secret: bytes, epoch: int, timeout: float, connections: int = 0
    ) -> None:
        """Connect to "host:port". epoch: that it must have; 0: any. timeout: also what a peer may
        be silent for. connections: that one move may use; 0: as many as are of use."""
    def info(self, timeout: float) -> bytes: ...
    def read(
        self,
        region_id: int,
        remote_offsets: npt.NDArray[np.uint64],
        local_addresses: npt.NDArray[np.uint64],
        lengths: npt.NDArray[np.uint64],
        checksums: npt.NDArray[np.uint64] | None,
        timeout: float,
        cancel: CancelFlag | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Bring pieces here; return what became of each (kvstore.transport.Status)."""
    def write(
        self,
        region_id: int,
        remote_offsets: npt.NDArray[np.uint64],
        local_addresses: npt.NDArray[np.uint64],
        lengths: npt.NDArray[np.uint64],
        checksums: npt.NDArray[np.uint64] | None,
        timeout: float,
        cancel: CancelFlag | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Bring pieces there; return what became of each."""
    def is_alive(self) -> bool:
        """False once the peer was found to be gone, until a move has reached it again."""
    def is_settled(self) -> bool:
        """False when a write was given up whose bytes the peer may still be taking in."""
    def close(self) -> bool:
        """End it, and all moves. True: it is settled, at both ends."""

def gather(
    plan: CopyPlan,
    block_ids: npt.NDArray[np.int64],
    addrs: npt.NDArray[np.uint64],
    checksums: npt.NDArray[np.uint64] | None = None,
    threads: int = 1,
) -> None:
    """Canonical block at addrs[i] <- engine block block_ids[i]; fills `checksums` where given."""

def scatter(
    plan: CopyPlan,
    block_ids: npt.NDArray[np.int64],
    addrs: npt.NDArray[np.uint64],
    checksums: npt.NDArray[np.uint64] | None = None,
    threads: int = 1,
) -> None:
    """Engine block block_ids[i] <- canonical block at addrs[i]; ids must be distinct."""

def gather_range(
    plan: CopyPlan,
    block_ids: npt.NDArray[np.int64],
    addrs: npt.NDArray[np.uint64],
    offset_begin: int,
    offset_end: int,
    threads: int = 1,
) -> None:
    """As gather, for the payload bytes [offset_begin, offset_end) of every block."""

def scatter_range(
    plan: CopyPlan,
    block_ids: npt.NDArray[np.int64],
    addrs: npt.NDArray[np.uint64],
    offset_begin: int,
    offset_end: int,
    threads: int = 1,
) -> None: ...
def checksum_blocks(
    addrs: npt.NDArray[np.uint64],
    bytes: int,
    checksums: npt.NDArray[np.uint64],
    threads: int = 1,
) -> None: ...
def dlpack_describe(
    capsule: object,
) -> tuple[int, tuple[int, ...], tuple[int, ...], int, str, int, int, bool]:
    """(address, shape, strides in bytes, itemsize, dtype, device type, device id, readonly)."""

def _simd_level() -> int: ...
def _force_simd_level(level: int) -> bool: ...

# --- quant
CODEC_HEADER_BYTES: int

class CodecFormat:
    """What encoder and decoder of a block must agree on; immutable."""

    def __init__(
        self,
        *,
        codec: int,
        element: int,
        planes: int,
        tokens: int,
        heads: int,
        dim: int,
        raw_bytes: int,
        shuffle_width: int = 0,
    ) -> None: ...
    @property
    def encoded_bytes(self) -> int: ...

def codec_simd_level() -> int: ...
def codec_encode(
    format: CodecFormat,
    raw_addrs: npt.NDArray[np.uint64],
    out: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.uint64],
    statuses: npt.NDArray[np.uint8],
    errors: npt.NDArray[np.float64],
    simd: int | None = None,
) -> None: ...
def codec_decode(
    format: CodecFormat,
    encoded_addrs: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.uint64],
    out_addrs: npt.NDArray[np.uint64],
    statuses: npt.NDArray[np.uint8],
    simd: int | None = None,
) -> None: ...
def codec_check_headers(
    format: CodecFormat,
    encoded_addrs: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.uint64],
    encoded_bytes: npt.NDArray[np.uint64],
    statuses: npt.NDArray[np.uint8],
) -> None: ...
def codec_write_header(
    format: CodecFormat, out: npt.NDArray[np.uint8], encoded_bytes: int
) -> None: ...
def codec_copy(
    from_addrs: npt.NDArray[np.uint64], to_addrs: npt.NDArray[np.uint64], bytes: int
) -> None: ...
def codec_shuffle(address: int, shuffled: npt.NDArray[np.uint8], width: int) -> None: ...
def codec_unshuffle(shuffled: npt.NDArray[np.uint8], address: int, width: int) -> None: ...

# --- io
class IoQueue:
    """Batches of extents to and from files; kind "auto", "uring" or "threads"."""

    def __init__(self, kind: str = "auto", depth: int = 16) -> None: ...
    @property
    def kind(self) -> str: ...
    @property
    def depth(self) -> int: ...
    def write(
        self,
        fds: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.uint64],
        addrs: npt.NDArray[np.uint64],
        bytes: npt.NDArray[np.uint64],
    ) -> npt.NDArray[np.int32]: ...
    def read(
        self,
        fds: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.uint64],
        addrs: npt.NDArray[np.uint64],
        bytes: npt.NDArray[np.uint64],
        checksums: npt.NDArray[np.uint64] | None = None,
    ) -> npt.NDArray[np.int32]: ...

def io_checksum(buffer: bytes | bytearray | memoryview | npt.NDArray[Any]) -> int: ...
def io_checksum_rows(rows: npt.NDArray[np.uint8], covered: int) -> npt.NDArray[np.uint64]: ...
def io_checksum_at(
    addrs: npt.NDArray[np.uint64], bytes: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]: ...

# --- policy
def eviction_policy_names() -> list[str]: ...

class EvictionPolicy:
    def __init__(self, name: str, num_slots: int) -> None: ...
    def add(self, slot: int, key: int) -> None: ...
    def touch(self, slot: int) -> None: ...
    def touch_all(self, slots: npt.NDArray[np.uint32]) -> None: ...
    def remove(self, slot: int) -> None: ...
    def due(self, slot: int) -> None: ...
    def pop_victim(
        self, evictable: npt.NDArray[np.bool_] | Callable[[int], bool]
    ) -> int | None: ...
    @property
    def size(self) -> int: ...

class PolicySimulator:
    def __init__(self, name: str, capacity_blocks: int) -> None: ...
    def request(self, ids: npt.NDArray[np.uint64]) -> int: ...
    @property
    def resident(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def checks(self) -> int: ...

# --- core
@final
class BlockIndex:
    def __init__(self) -> None: ...
    def insert_chain(self, namespace_id: int, hashes: npt.NDArray[np.uint8]) -> None: ...
    def remove_leaf(self, namespace_id: int, hash: bytes) -> bool: ...
    def match(self, namespace_id: int, hashes: npt.NDArray[np.uint8], start: int) -> int: ...
    def count(self, namespace_id: int, hashes: npt.NDArray[np.uint8]) -> int: ...
    def __len__(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...

@final
class StoreCore:
    def __init__(
        self, arena_bytes: int, chunk_bytes: int, huge_pages: bool, policy: str
    ) -> None: ...
    @staticmethod
    def adopt(fd: int, policy: str) -> StoreCore: ...
    @property
    def arena_id(self) -> bytes: ...
    def metadata(self) -> bytes: ...
    def set_metadata(self, data: bytes) -> None: ...
    def recover(self, namespace_ids: dict[int, int]) -> dict[str, int]: ...
    def recovered_not_on_ssd(self, namespace_id: int) -> bytes: ...
    def quarantine(self) -> list[tuple[int, int, int, int]]: ...
    def release_quarantine(self, writer_id: int) -> int: ...
    def add_tenant(self, cpu_quota_bytes: int, ssd_quota_bytes: int) -> int: ...
    def tenant_stats(self, tenant: int) -> dict[str, int]: ...
    def scrub(self, cursor: int, max_bytes: int) -> tuple[int, int, int]: ...
    def why(self, namespace_id: int, hash: bytes) -> int: ...
    @property
    def change_count(self) -> int: ...
    def wait_for_change(self, seen: int, timeout_seconds: float) -> int: ...
    def add_namespace(self, block_bytes: int, tenant: int = 0) -> int: ...
    def block_bytes(self, namespace_id: int) -> int: ...
    def new_owner(self, writer_id: int = 0, pid: int = 0, pid_start: int = 0) -> int: ...
    def release_owner(self, owner: int) -> None: ...
    def match(self, namespace_id: int, hashes: npt.NDArray[np.uint8], start: int) -> int: ...
    def residency(
        self, namespace_id: int, hashes: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.uint8]: ...
    def wait_for(
        self,
        namespace_id: int,
        hashes: npt.NDArray[np.uint8],
        start: int,
        want: int,
        timeout_seconds: float,
    ) -> int: ...
    def reserve(
        self,
        owner: int,
        namespace_id: int,
        hashes: npt.NDArray[np.uint8],
        start: int,
        parent: bytes | None,
        only_from_ssd: bool,
    ) -> tuple[int, npt.NDArray[np.uint8], npt.NDArray[np.uint64]]: ...
    def commit(
        self,
        owner: int,
        reservation: int,
        checksums: npt.NDArray[np.uint64] | None,
        ok: npt.NDArray[np.bool_] | None,
    ) -> bool: ...
    def abort(self, owner: int, reservation: int) -> None: ...
    def acquire(
        self,
        owner: int,
        namespace_id: int,
        hashes: npt.NDArray[np.uint8],
        ttl_seconds: float | None,
        use: bool,
    ) -> tuple[
        int,
        npt.NDArray[np.uint64],
        npt.NDArray[np.uint64],
        npt.NDArray[np.uint64],
        npt.NDArray[np.uint64],
    ]: ...
    def release(self, owner: int, lease: int) -> bool: ...
    def expire_leases(self) -> int: ...
    def put(
        self,
        owner: int,
        namespace_id: int,
        hashes: npt.NDArray[np.uint8],
        start: int,
        parent: bytes | None,
        plan: CopyPlan,
        block_ids: npt.NDArray[np.int64],
        threads: int,
    ) -> tuple[int, int, int, int, int, int]: ...
    def load(
        self,
        owner: int,
        namespace_id: int,
        hashes: npt.NDArray[np.uint8],
        plan: CopyPlan,
        block_ids: npt.NDArray[np.int64],
        verify: bool,
        threads: int,
    ) -> tuple[int, bool]: ...
    def remove(self, namespace_id: int, hashes: npt.NDArray[np.uint8]) -> int: ...
    def clear(self, namespace_id: int) -> None: ...
    def set_ssd(self, records: npt.NDArray[np.void]) -> None: ...
    def move_ssd(
        self, from_records: npt.NDArray[np.void], to_records: npt.NDArray[np.void]
    ) -> None: ...
    def describe(self, namespace_id: int, hashes: npt.NDArray[np.uint8]) -> bytes: ...
    def ssd_gap(self, namespace_id: int, hash: bytes) -> bytes: ...
    def drop_ssd(self, namespace_id: int, hash: bytes, segment: int, page: int) -> None: ...
    def survivors(self, records: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]: ...
    def restore(self, records: npt.NDArray[np.void]) -> int: ...
    def take_garbage(self) -> bytes: ...
    def enable_events(self, capacity: int) -> None: ...
    def event_sequence(self, namespace_id: int) -> int: ...
    def events_after(self, namespace_id: int, after: int) -> bytes: ...
    def stats(self) -> dict[str, int]: ...
    @property
    def arena_fd(self) -> int: ...
    @property
    def arena_bytes(self) -> int: ...
    @property
    def arena(self) -> npt.NDArray[np.uint8]: ...

# --- net: the daemon's server and its clients' connections (docs/design/0003-daemon.md)
LATENCY_BOUNDS: list[float]

class RemoteError(Exception):
    """A reply with a status; the connection goes on."""

    def __init__(self, status: int, message: str) -> None: ...
    @property
    def status(self) -> int: ...
    @property
    def message(self) -> str: ...

class ProtocolError(Exception):
    """Bytes that are no frame of ours; the connection is closed."""

@final
class Task:
    """A request that Python answers with `NativeServer.reply`, or a notice, which has id 0.

    kind: the operation (HELLO 32, AUTH 33, CALL 34, ACQUIRE 4, COMMIT 7, WRITE 11, QUIESCED 14), or
    200 a chain was stored, 201 a chain is to be prefetched, 202 a chain was used (in all three the
    body is the chain), 203 the client is gone: what it held is released already.

    Of COMMIT and WRITE (ack > 0) the body is as in a COMMIT with reservation 0: what was reserved
    is checked, committed and counted already; the answer is the level (u64), and nothing more for
    WRITE either. Of ACQUIRE nothing is counted yet.
    """

    @property
    def id(self) -> int: ...
    @property
    def kind(self) -> int: ...
    @property
    def connection(self) -> int: ...
    @property
    def client(self) -> int:
        """0 before it is admitted."""
    @property
    def owner(self) -> int: ...
    @property
    def namespace_id(self) -> int:
        """-1: none."""
    @property
    def body(self) -> bytes: ...
    @property
    def age_seconds(self) -> float: ...
    @property
    def peer_uid(self) -> int:
        """-1 over TCP."""
    @property
    def peer_pid(self) -> int: ...
    @property
    def is_local(self) -> bool: ...

@final
class NativeServer:
    """Answers the hot requests on threads of its own; the rest are tasks. Thread-safe.

    The owner given to `add_client` becomes the server's: it releases it when the client's last
    connection has closed, so nobody else may.
    """

    def __init__(
        self,
        core: StoreCore,
        threads: int = 2,
        connections_max: int = 1024,
        tasks_max: int = 4096,
    ) -> None: ...
    def listen(self, fd: int, is_local: bool) -> None: ...
    def serve(self, fd: int) -> bool:
        """Serve a connected socket, the server's from now on, as one that came over TCP. False: it
        has stopped."""
    def next_task(self, timeout: float) -> Task | None: ...
    def add_client(
        self,
        connection: int,
        client: int,
        owner: int,
        namespace_id: int,
        *,
        may_map: bool,
        may_map_writable: bool,
        notices: bool,
        notice_used: bool,
        label: str,
        block_tokens: int = 0,
        may_read: bool = True,
        may_write: bool = True,
    ) -> bool:
        """Admit a connection as a new client, before the reply to its greeting.

        `client` must not be 0; namespace_id < 0: none, only CALL and PING work. `notices`: there is
        an ssd tier. `may_read`, `may_write`: payload through the connection by READ, slots by
        RESERVE. False when the connection is gone: the owner is the caller's to release then.
        """
    def join_client(self, connection: int, client: int) -> bool: ...
    def reply(self, task_id: int, body: bytes, status: int = 0) -> bool: ...
    def hang_up(self, connection: int) -> None:
        """Close it once the answers given so far are sent."""
    def clients(self) -> list[dict[str, Any]]: ...
    def stats(self) -> dict[str, int]: ...
    def latencies(self) -> dict[str, tuple[list[int], float]]: ...
    def hot_prefixes(self) -> list[tuple[int, bytes, int, int]]: ...
    def drain(self, timeout: float) -> bool: ...
    def stop(self) -> None: ...

@final
class Connection:
    """A client's connection; one call at a time, `close` at any time.

    Raises:
        TimeoutError: the deadline of the whole call; the connection is closed.
        ConnectionError: the peer is gone, or this side is closed.
        RemoteError: the peer refused; the connection goes on.
        ProtocolError: what came is no reply of ours; the connection is closed.
        RuntimeError: another thread is in a call.
    """

    def __init__(self, address: str, timeout: float) -> None: ...
    @staticmethod
    def over(fd: int, address: str) -> Connection:
        """Over a connected socket, which is its own from now on; errors call the peer `address`."""
    def call(self, op: int, body: Buffer, timeout: float) -> bytes: ...
    def map(self, writable: bool, timeout: float) -> tuple[int, int]:
        """A descriptor of the arena, the caller's to close, and the arena's bytes."""
    def match(
        self, hashes: npt.NDArray[np.uint8], start: int, parent: bytes | None, timeout: float
    ) -> int: ...
    def lookup(
        self,
        flags: int,
        hashes: npt.NDArray[np.uint8],
        start: int,
        parent: bytes | None,
        timeout: float,
    ) -> tuple[int, int]: ...
    def residency(
        self, hashes: npt.NDArray[np.uint8], start: int, parent: bytes | None, timeout: float
    ) -> npt.NDArray[np.uint8]: ...
    def acquire(
        self,
        ttl: float,
        wait: float,
        flags: int,
        hashes: npt.NDArray[np.uint8],
        start: int,
        parent: bytes | None,
        timeout: float,
    ) -> tuple[
        int,
        npt.NDArray[np.uint64],
        npt.NDArray[np.uint64],
        npt.NDArray[np.uint64],
        npt.NDArray[np.uint64],
    ]:
        """Lease, payload offsets, header offsets, sequences, checksums. ttl < 0: no end."""
    def release(self, leases: npt.NDArray[np.uint64], timeout: float) -> npt.NDArray[np.bool_]: ...
    def reserve(
        self,
        wait: float,
        hashes: npt.NDArray[np.uint8],
        start: int,
        parent: bytes | None,
        timeout: float,
    ) -> tuple[int, npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
        """Reservation, payload offsets (0 where not reserved), statuses."""
    def commit(
        self,
        reservation: int,
        ack: int,
        checksums: npt.NDArray[np.uint64],
        hashes: npt.NDArray[np.uint8],
        start: int,
        parent: bytes | None,
        timeout: float,
    ) -> int: ...
    def abort(self, reservation: int, timeout: float) -> None: ...
    def wait_for(
        self,
        wait: float,
        want: int,
        hashes: npt.NDArray[np.uint8],
        start: int,
        parent: bytes | None,
        timeout: float,
    ) -> int: ...
    def ping(self, data: bytes, timeout: float) -> bytes: ...
    def read(
        self,
        lease: int,
        first: int,
        addresses: npt.NDArray[np.uint64],
        block_bytes: int,
        timeout: float,
    ) -> None: ...
    def write(
        self,
        reservation: int,
        ack: int,
        checksums: npt.NDArray[np.uint64],
        hashes: npt.NDArray[np.uint8],
        start: int,
        parent: bytes | None,
        addresses: npt.NDArray[np.uint64],
        block_bytes: int,
        timeout: float,
    ) -> tuple[int, npt.NDArray[np.bool_]]:
        """The level reached, and which blocks' checksums matched at the other end."""
    def fileno(self) -> int:
        """-1 once closed."""
    def close(self) -> None: ...

def map_shared(fd: int, bytes: int, writable: bool) -> npt.NDArray[np.uint8]:
    """Map a file's first bytes, shared, where huge pages of it can be mapped whole. Raises OSError.

    Unmapped with the last array that refers to it.
    """

class EchoServer:
    """Echoes on a listening socket, one connection after the other: a bench's yardstick."""

    def __init__(self, fd: int) -> None: ...
    def stop(self) -> None: ...

def refusal(header: bytes, status: int, message: bytes) -> bytes | None:
    """The frame that answers one with this header with an error; None: it is no header of ours."""

def echo_round_trips(
    address: str, request_bytes: int, reply_bytes: int, count: int
) -> npt.NDArray[np.float64]:
    """Seconds of each of `count` blocking round trips to an EchoServer."""

# --- UCX
class UcxContext:
    """What one endpoint has of UCX: a server of regions, and links. Not for forked children.

    Raises RuntimeError, which names the library and the reason. One library a process.
    """

    def __init__(
        self,
        library: str,
        tls: str,
        net_devices: str,
        timeout: float,
        secret: bytes,
        epoch: int,
        settings: Sequence[tuple[str, str]] = ...,
        spin: float = ...,
        modules: str = ...,
        one_sided: bool = ...,
    ) -> None: ...
    @property
    def version(self) -> str: ...
    @property
    def library(self) -> str: ...
    def transports(self) -> list[tuple[str, str]]:
        """Pairs of transport and device."""
    def address(self) -> bytes: ...
    def num_peers(self) -> int: ...
    def register(self, region_id: int, address: int, num_bytes: int, writable: bool) -> bool:
        """False when a region has that id. The memory stays mapped until it is deregistered."""
    def deregister(self, region_id: int, timeout: float) -> bool:
        """True: no peer has its key any more. May be called again."""
    def connect(self, address: bytes, epoch: int, secret: bytes, timeout: float) -> UcxLink:
        """epoch 0: any. Raises ConnectionError, TimeoutError, PermissionError (refused)."""
    def close(self) -> None: ...

@final
class UcxLink:
    """While it is alive after a move, local memory is settled."""

    def read(
        self,
        region_id: int,
        remote_offsets: npt.NDArray[np.uint64],
        local_addresses: npt.NDArray[np.uint64],
        lengths: npt.NDArray[np.uint64],
        checksums: npt.NDArray[np.uint64] | None,
        timeout: float,
        cancel: CancelFlag | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Statuses (kvstore.transport.Status)."""
    def write(
        self,
        region_id: int,
        remote_offsets: npt.NDArray[np.uint64],
        local_addresses: npt.NDArray[np.uint64],
        lengths: npt.NDArray[np.uint64],
        checksums: npt.NDArray[np.uint64] | None,
        timeout: float,
        cancel: CancelFlag | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Statuses; checksums are not looked at."""
    def is_alive(self) -> bool: ...
    def failure(self) -> str:
        """Why it is not alive; "" while it is."""
    def transports(self) -> str: ...
    def close(self, timeout: float) -> bool:
        """True: settled, nobody writes into local memory for it any more."""
