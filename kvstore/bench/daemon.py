"""A daemon as its clients see it: put and load from another process, round trips, many at once.

Put and load walk as those of the embedded store do (see dram.py), with the store in the daemon and
this process as the engine. Round trips are beside a bare C++ echo of the same bytes, which has a
process of its own, as the daemon has.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import kvstore
from kvstore import _native
from kvstore.bench import adoption, crowd, dram
from kvstore.bench.helpers import EchoProcess, SenderProcess, free_port
from kvstore.bench.report import Figure
from kvstore.bench.serving import PrivateDaemon
from kvstore.bench.timing import Scale, Seconds, in_turn, median, speedup
from kvstore.block import BlockHashes, BlockSpec, Namespace
from kvstore.errors import ConfigError
from kvstore.store import Store

MIB = dram.MIB
BATCH = 16
TIMEOUT_SECONDS = 10.0
SMALL = BlockSpec(num_layers=1, num_kv_heads=1, head_dim=16, block_tokens=16, dtype="int8")
BATCH_SIZES = (1, 16, 64, 256, 1024)
LONG_CHAIN = 8192
HEADER_BYTES, CHAIN_BYTES, HASH_BYTES = 16, 48, 32  # of a frame; docs/design/0003-daemon.md
ECHO = "three bare C++ echoes of the same bytes"


@dataclass(frozen=True)
class Target:
    """The daemon to measure. `tcp` is empty where it is not known to listen there."""

    address: str
    tcp: str = ""


def _namespace(spec: BlockSpec, what: str) -> Namespace:
    """Blocks of one measurement: nobody else's are in the way."""
    return Namespace(f"bench-{what}-{np.random.default_rng().integers(1 << 62):x}", spec)


@contextmanager
def _store(address: str, spec: BlockSpec, what: str) -> Iterator[Store]:
    with kvstore.connect(address, _namespace(spec, what), timeout=TIMEOUT_SECONDS) as store:
        try:
            yield store
        finally:
            store.clear()


def arena_bytes(scale: Scale) -> int:
    """DRAM that a daemon needs for these figures: the walk's blocks and their headers."""
    return scale.pick(512, 64) * MIB * 65 // 64 + 16 * MIB


@contextmanager
def _walk(address: str, scale: Scale) -> Iterator[dram.Walk]:
    with _store(address, dram.SPEC_1MIB, "walk") as store:
        has = int(store.stats()["kvstore_cpu_capacity_bytes"])
        if has < arena_bytes(scale):
            raise ConfigError(
                f"connect: the daemon has {has >> 20} MiB of DRAM, the bench needs "
                f"{arena_bytes(scale) >> 20}"
            )
        yield dram.walk_of(store, scale, BATCH)


def shared_memory(scale: Scale, target: Target) -> list[Figure]:
    """put and load of 16 blocks of 1 MiB over the Unix socket, in place."""
    with _walk(target.address, scale) as walk:
        taken = walk.measure(scale.pick(200, 20))
    return [
        Figure(
            f"shm_{ours}_16x1MiB",
            BATCH * MIB / median(taken[ours]) / 1e9,
            "GB/s",
            speedup(taken[ours], taken[theirs]),
            dram.MEMCPY,
        )
        for ours, theirs in (("put", "copy_in"), ("load", "copy_out"))
    ]


def tcp(scale: Scale, target: Target) -> list[Figure]:
    """load of 16 blocks of 1 MiB over TCP on loopback, where payloads go through the socket."""
    if not target.tcp:
        return [Figure.absent("tcp_load_16x1MiB", "the daemon's TCP address was not given")]
    rounds = scale.pick(100, 10)
    with _walk(target.tcp, scale) as walk, SenderProcess(walk.source.size) as sender:
        walk.prepare(rounds)
        resident = walk.arena_steps // 4  # nothing is put meanwhile, so loads go round in these
        taken = in_turn(
            {
                "load": lambda number: walk.load(number % resident),
                "plain": lambda number: sender.receive(_rows(walk, number)),
            },
            rounds,
        )
        walk.check(0)
    rate = BATCH * MIB / median(taken["load"]) / 1e9
    ratio = speedup(taken["load"], taken["plain"])
    return [Figure("tcp_load_16x1MiB", rate, "GB/s", ratio, "plain TCP socket, same bytes")]


def _rows(walk: dram.Walk, number: int) -> dram.Bytes:
    step = number % walk.engine_steps
    size = walk.batch * walk.block_bytes
    return walk.target[step * size : (step + 1) * size]


class _Prefixes:
    """Resident chains of small blocks, and the three requests that serve a batch of them."""

    def __init__(self, store: Store, num_blocks: int) -> None:
        self.chain = BlockHashes.chain(
            np.random.default_rng().integers(0, 256, (num_blocks, HASH_BYTES), np.uint8)
        )
        blocks = kvstore.ContiguousBlocks(np.zeros((num_blocks, SMALL.block_bytes), np.uint8))
        stored = store.put(self.chain, blocks).wait().num_stored
        if stored != num_blocks:
            raise ConfigError(f"connect: the daemon has room for {stored} of {num_blocks} blocks")
        self.store = store

    def by_store(self, num_blocks: int) -> Callable[[int], None]:
        """As an engine asks, through Store."""
        chain = self.chain[:num_blocks]

        def ask(_: int) -> None:
            assert self.store.lookup(chain).num_blocks == num_blocks
            with self.store.acquire(chain) as lease:
                assert len(lease) == num_blocks

        return ask


class _Wire:
    """A connection of `_native`, without the client library around it."""

    def __init__(self, address: str, namespace: Namespace) -> None:
        from kvstore.client.handshake import Target as Peer
        from kvstore.client.handshake import dial

        self.connection, _ = dial(Peer(address, namespace), b"", TIMEOUT_SECONDS)

    def lookup(self, chain: BlockHashes) -> int:
        found: int = self.connection.lookup(
            0, chain.array, chain.start, chain.parent, TIMEOUT_SECONDS
        )[0]
        return found

    def acquire(self, chain: BlockHashes) -> int:
        lease: int = self.connection.acquire(
            60.0, 0.0, 0, chain.array, chain.start, chain.parent, TIMEOUT_SECONDS
        )[0]
        return lease

    def release(self, lease: int) -> None:
        self.connection.release(np.array([lease], np.uint64), TIMEOUT_SECONDS)

    def all_three(self, chain: BlockHashes) -> Callable[[int], None]:
        def ask(_: int) -> None:
            assert self.lookup(chain) == len(chain)
            self.release(self.acquire(chain))

        return ask


def _echo_bytes(num_blocks: int) -> tuple[tuple[int, int], ...]:
    """(request, reply) of lookup, acquire and release of a batch, in bytes with headers."""
    chain = CHAIN_BYTES + HASH_BYTES * num_blocks
    return (
        (HEADER_BYTES + 8 + chain, HEADER_BYTES + 16),
        (HEADER_BYTES + 24 + chain, HEADER_BYTES + 16 + 32 * num_blocks),
        (HEADER_BYTES + 16, HEADER_BYTES + 1),
    )


def round_trips(scale: Scale, target: Target) -> list[Figure]:
    """lookup + acquire + release of a batch.

    `daemon_batch_rtt_us` is the three on one connection, for 16 blocks; `_N` for N blocks;
    `_store_us` through `Store`, which is what Python adds.
    """
    rounds, calls = scale.pick(40, 4), 50
    figures: list[Figure] = []
    with _store(target.address, SMALL, "rtt") as store, EchoProcess() as echo:
        prefixes = _Prefixes(store, max(BATCH_SIZES))
        wire = _Wire(target.address, store.namespace)
        for size in (BATCH, *(size for size in BATCH_SIZES if size != BATCH)):
            suffix = "" if size == BATCH else f"_{size}"
            ways = {f"daemon_batch_rtt{suffix}_us": wire.all_three(prefixes.chain[:size])}
            if size == BATCH:
                ways["daemon_batch_rtt_store_us"] = prefixes.by_store(size)
            figures += _beside_echo(ways, echo, size, rounds, calls)
    return figures


def _beside_echo(
    ways: dict[str, Callable[[int], None]], echo: EchoProcess, size: int, rounds: int, calls: int
) -> list[Figure]:
    """Rounds of `calls` calls each, since a single one is too short to take turns."""
    taken: dict[str, list[Seconds]] = {name: [] for name in (*ways, ECHO)}
    for number in range(rounds):
        for name in list(taken) if number % 2 == 0 else list(reversed(taken)):
            if name == ECHO:
                trips = [
                    _native.echo_round_trips(echo.address, request, reply, calls)
                    for request, reply in _echo_bytes(size)
                ]
                taken[name].append(np.sum(trips, axis=0))
            else:
                taken[name].append(in_turn({name: ways[name]}, calls)[name])
    medians = {name: np.array([median(each) for each in taken[name]]) for name in taken}
    return [
        Figure(name, median(medians[name]) * 1e6, "us", speedup(medians[name], medians[ECHO]), ECHO)
        for name in ways
    ]


def long_chains(scale: Scale, target: Target) -> list[Figure]:
    """One call for 8,192 hashes, all of them resident."""
    with _store(target.address, SMALL, "long") as store:
        prefixes = _Prefixes(store, LONG_CHAIN)
        wire = _Wire(target.address, store.namespace)
        leases: list[int] = []

        def acquire(_: int) -> None:
            leases.append(wire.acquire(prefixes.chain))

        def lookup(_: int) -> None:
            assert wire.lookup(prefixes.chain) == LONG_CHAIN
            while leases:  # not in the time of acquire
                wire.release(leases.pop())

        for _ in range(3):
            acquire(0)
            lookup(0)
        lookups = {"lookup": lambda _: wire.lookup(prefixes.chain), "acquire": acquire}
        taken: dict[str, list[float]] = {name: [] for name in lookups}
        for _ in range(scale.pick(200, 20)):
            for name, seconds in in_turn(lookups, 1).items():
                taken[name].append(seconds[0])
            lookup(0)
    return [
        Figure(f"daemon_{name}_8192_ms", float(np.median(taken[name])) * 1e3, "ms")
        for name in taken
    ]


def clients(scale: Scale, target: Target) -> list[Figure]:
    return crowd.figures(scale, target.address)


@dataclass(frozen=True)
class Measurement:
    """Figures that one run gives together."""

    names: tuple[str, ...]
    run: Callable[[Scale, Target], Sequence[Figure]]


MEASUREMENTS = (
    Measurement(("shm_load_16x1MiB", "shm_put_16x1MiB"), shared_memory),
    Measurement(
        (
            "daemon_batch_rtt_us",
            "daemon_batch_rtt_store_us",
            *(f"daemon_batch_rtt_{size}_us" for size in BATCH_SIZES if size != BATCH),
        ),
        round_trips,
    ),
    Measurement(("daemon_lookup_8192_ms", "daemon_acquire_8192_ms"), long_chains),
    Measurement(("clients_8_total", "clients_8_fairness"), clients),
    Measurement(("tcp_load_16x1MiB",), tcp),
)
# These start daemons of their own, whatever is connected to.
ADOPTIONS = {"adopt_100k_blocks_s": 100_000, "adopt_1m_slots_s": 1_000_000}
FULL_ONLY = frozenset(("adopt_1m_slots_s",))
NAMES = (*(name for each in MEASUREMENTS for name in each.names), *ADOPTIONS)


@contextmanager
def _target(address: str, scale: Scale) -> Iterator[Target]:
    if address:
        if address.startswith("tcp:"):
            raise ConfigError(f"connect: {address!r}: give the daemon's Unix socket")
        yield Target(address)
        return
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as directory:
        endpoint = f"127.0.0.1:{free_port()}"
        daemon = PrivateDaemon(
            Path(directory), cpu=str(arena_bytes(scale)), tcp=endpoint, threads="1"
        )
        with daemon:
            daemon.start()
            yield Target(daemon.address, f"tcp:{endpoint}")


def run(
    wanted: set[str], address: str, scale: Scale, progress: Callable[[str], None]
) -> list[Figure]:
    """Measure the figures `wanted` of the daemon at `address`; "": of one of our own.

    Raises:
        KVStoreError: a daemon cannot be reached or started, or is too small.
    """
    figures: list[Figure] = []
    with contextlib.ExitStack() as stack:
        chosen = [each for each in MEASUREMENTS if wanted.intersection(each.names)]
        if chosen:
            target = stack.enter_context(_target(address, scale))
            for measurement in chosen:
                progress(measurement.names[0])
                figures += measurement.run(scale, target)
    for name, blocks in ADOPTIONS.items():
        if name in wanted:
            progress(name)
            figures.append(adoption.figure(name, scale, blocks))
    return [figure for figure in figures if figure.name in wanted]
