"""What every Store must do, whatever is behind it.

Proved: the promises of a store one by one, on stores of 15 slots, so that full is never far. Each
block's bytes follow from its hash, so that every byte that a load counts is compared. A store that
cannot pass is not a store: add it to STORES.
"""

import asyncio
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import trustme

import kvstore
from kvstore import (
    AllBlocksCleared,
    BlockHashes,
    BlockRemoved,
    BlockStored,
    ConfigError,
    ContiguousBlocks,
    DeadlineExceededError,
    Hit,
    Store,
    StoreClosedError,
)
from kvstore.daemon.server import Server
from kvstore.daemon.sockets import listen_tcp, listen_unix
from kvstore.daemon.tenants import Tenants
from kvstore.tiers.local import LocalControl
from tests.store_support import (
    BLOCK_BYTES,
    NAMESPACE,
    SLOTS,
    WAIT_S,
    assert_exact,
    buffers_of,
    bytes_of,
    chain,
    load,
    open_store,
    paged,
    payload,
    put,
)

Open: TypeAlias = Callable[..., Store]
# Where the decisions are made, how bytes come and go, and what is below DRAM.
STORES = ["cpu", "ssd", "unix", "unix+ssd", "unix+copy", "tcp", "tcp+ssd"]
SECRET = "a secret of this test's own"


@pytest.fixture(params=[*STORES, pytest.param("tcp+tls", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def owners() -> list[Store]:
    """The stores whose memory holds the blocks: of a client's, the one in the serving process."""
    return []


@pytest.fixture
def opened(kind: str, owners: list[Store], tmp_path: Path) -> Iterator[Open]:
    """Opens stores of the kind under test; what is still open at the end is closed."""
    with ExitStack() as ends:
        # pytest's own directories have names too long for a socket.
        sockets = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="kv-")))

        def make(**settings: Any) -> Store:
            store = open_store(tmp_path / "ssd" if "ssd" in kind else None, **settings)
            ends.callback(store.close)
            owners.append(store)
            if kind in ("cpu", "ssd"):
                return store
            server = ends.enter_context(serve(store, kind, sockets / "s"))
            token = SECRET if "tcp" in kind else None
            tls = None
            if "tls" in kind:
                certificates = make_certificates(sockets)
                server.listen(listen_tcp("127.0.0.1", 0), certificates.server_context())
                # Ours, too: the server asks for one.
                tls = certificates
            address = server.addresses[-1]
            client = kvstore.connect(address, NAMESPACE, timeout=WAIT_S, token=token, tls=tls)
            ends.callback(client.close)
            return client

        yield make


def make_certificates(directory: Path) -> kvstore.TlsFiles:
    """A server's certificate, and who signed it."""
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    files = kvstore.TlsFiles(*(str(directory / name) for name in ("ca", "cert", "key")))
    authority.cert_pem.write_to_path(files.ca)
    made.cert_chain_pems[0].write_to_path(files.cert)
    Path(files.key).touch(0o600)
    made.private_key_pem.write_to_path(files.key)
    return files


def serve(store: Store, kind: str, path: Path) -> Server:
    if "tcp" in kind or "copy" in kind:
        control = store.control
        assert isinstance(control, LocalControl)
        tcp = "tcp" in kind
        listener = listen_tcp("127.0.0.1", 0) if tcp else listen_unix(path)
        tenants = Tenants({}, {"": SECRET.encode()}, os.getuid())
        writes = "copy" if "copy" in kind else "in_place"
        return Server(control.tiers, [listener], tenants=tenants, client_writes=writes)
    return kvstore.share(store, f"unix:{path}")


@pytest.fixture
def store(opened: Open) -> Store:
    return opened()


# --- exact bytes or a miss


def test_what_was_put_is_loaded_exactly(store: Store) -> None:
    hashes = chain(1, 6)
    result = put(store, hashes)
    assert (result.num_blocks, result.num_stored, result.ack) == (6, 6, "memory")
    assert load(store, hashes) == 6
    assert load(store, hashes[:2]) == 2
    assert load(store, hashes[2:5]) == 3
    assert store.match(hashes) == 6
    assert store.lookup(hashes).num_blocks == 6


def test_an_empty_store_misses(store: Store) -> None:
    hashes = chain(1, 6)
    assert load(store, hashes) == 0
    assert store.match(hashes) == 0
    assert store.lookup(hashes) == Hit(0, 0, 0)
    assert len(store.acquire(hashes)) == 0
    assert store.pin(hashes) == 0
    assert store.remove(hashes) == 0


def test_no_hashes_are_no_blocks(store: Store) -> None:
    none = chain(1, 0)
    blocks = ContiguousBlocks(np.zeros((1, BLOCK_BYTES), np.uint8))
    assert store.put(none, blocks, []).wait(WAIT_S).num_blocks == 0
    assert store.load(none, blocks, []).wait(WAIT_S).num_blocks == 0
    assert store.match(none) == 0
    assert len(store.acquire(none)) == 0
    assert store.pin(none) == 0
    store.unpin(none)
    assert store.remove(none) == 0
    assert store.prefetch(none).wait(WAIT_S).num_blocks == 0


def test_blocks_go_to_and_come_from_the_ids_that_are_given(store: Store) -> None:
    hashes = chain(1, 3)
    source, pool = paged(8)
    for i, block in enumerate((5, 0, 7)):
        source[block] = bytes_of(hashes[i])
    assert store.put(hashes, pool, [5, 0, 7]).wait(WAIT_S).num_stored == 3
    target, other = paged(8)
    assert store.load(hashes, other, [2, 6, 1]).wait(WAIT_S).num_blocks == 3
    assert_exact(hashes, target[[2, 6, 1]], 3)
    assert not target[[0, 3, 4, 5, 7]].any()


def test_putting_again_copies_nothing(store: Store) -> None:
    hashes = chain(1, 6)
    put(store, hashes[:4])
    again = put(store, hashes)
    assert (again.num_stored, again.num_present, again.num_blocks) == (2, 4, 6)
    other = ContiguousBlocks(np.zeros((6, BLOCK_BYTES), np.uint8))
    assert store.put(hashes, other).wait(WAIT_S).num_present == 6
    assert load(store, hashes) == 6  # a ready block is immutable


# --- prefixes


def test_gap_in_cached_blocks_breaks_prefix(store: Store) -> None:
    hashes = BlockHashes.of(chain(1, 6).array)  # unlinked: each block by itself
    put(store, hashes[:2])
    put(store, hashes[3:])
    assert store.match(hashes) == 2
    assert load(store, hashes) == 2
    assert load(store, hashes[3:]) == 3
    put(store, hashes[2:3])
    assert load(store, hashes) == 6


def test_a_block_without_the_one_before_it_is_refused(store: Store) -> None:
    hashes = chain(1, 6)
    result = put(store, hashes[3:])
    assert (result.num_stored, result.num_orphan, result.num_blocks) == (0, 3, 0)
    assert store.match(hashes[3:]) == 0
    put(store, hashes[:3])
    assert put(store, hashes[3:]).num_stored == 3
    assert load(store, hashes) == 6


def test_a_slice_may_be_put_after_its_prefix(store: Store) -> None:
    hashes = chain(1, 9)
    for begin in (0, 3, 6):
        assert put(store, hashes[begin : begin + 3]).num_stored == 3
    assert load(store, hashes) == 9


def test_a_longer_prompt_adds_to_a_shorter_one(store: Store) -> None:
    short = chain(1, 3)
    longer = short + chain(2, 3, short)
    put(store, short)
    assert store.match(longer) == 3
    assert put(store, longer).num_stored == 3
    assert load(store, longer) == 6


def test_wrong_lineage_is_refused_and_nothing_is_lost(store: Store) -> None:
    hashes, other = chain(1, 4), chain(2, 4)
    put(store, hashes)
    put(store, other[:2])
    # As if they stood elsewhere in another chain.
    wrong = BlockHashes.chain(other.array[2:], start=3, parent=hashes[1])
    assert put(store, wrong).num_orphan == 2
    unknown = BlockHashes.chain(other.array[2:], start=2, parent=bytes(32))
    assert put(store, unknown).num_orphan == 2
    assert load(store, hashes) == 4
    assert load(store, other) == 2


def test_unlinked_blocks_join_their_chain_when_it_is_put(store: Store) -> None:
    hashes = chain(1, 5)
    put(store, BlockHashes.of(hashes.array[:2]))
    assert load(store, hashes) == 2
    assert put(store, hashes).num_present == 2
    assert load(store, hashes) == 5
    assert store.remove(hashes[:1]) == 1
    assert store.match(hashes) == 0


def test_chains_share_their_common_prefix(store: Store) -> None:
    prefix = chain(1, 4)
    left = prefix + chain(2, 3, prefix)
    right = prefix + chain(3, 3, prefix)
    assert put(store, left).num_stored == 7
    assert put(store, right).num_stored == 3
    assert load(store, left) == load(store, right) == 7


# --- blocks by themselves


def alone(hashes: BlockHashes) -> BlockHashes:
    """The same blocks, of which nobody knows that they are a chain."""
    return BlockHashes.of(hashes.array)


def load_each(store: Store, hashes: BlockHashes, **options: Any) -> list[bool]:
    """Load, and compare every byte that counts."""
    room = np.zeros((len(hashes), BLOCK_BYTES), np.uint8)
    arrived = store.load_each(hashes, ContiguousBlocks(room), **options)
    for i in np.flatnonzero(arrived):
        assert np.array_equal(room[i], bytes_of(hashes[int(i)])), f"block {i} is wrong"
    return [bool(value) for value in arrived]


def test_a_gap_keeps_no_block_from_being_found_and_loaded_by_itself(store: Store) -> None:
    hashes = alone(chain(1, 8))
    assert not store.contains(hashes).any()
    assert load_each(store, hashes) == [False] * 8
    put(store, hashes[2:4])
    put(store, hashes[6:7])
    there = [i in (2, 3, 6) for i in range(8)]
    assert store.contains(hashes).tolist() == there
    assert load_each(store, hashes) == there
    assert store.match(hashes) == 0


def test_each_block_goes_to_the_id_that_is_given_for_it(store: Store) -> None:
    hashes = alone(chain(1, 4))
    put(store, hashes[1:2])
    put(store, hashes[3:4])
    target, pool = paged(8)
    assert store.load_each(hashes, pool, [7, 2, 0, 5]).tolist() == [False, True, False, True]
    assert np.array_equal(target[2], bytes_of(hashes[1]))
    assert np.array_equal(target[5], bytes_of(hashes[3]))


def test_put_each_tells_of_each_block_whether_it_is_there(store: Store) -> None:
    hashes = alone(chain(1, 6))
    put(store, hashes[4:5])
    assert store.put_each(hashes, buffers_of(hashes)).tolist() == [True] * 6
    assert store.put_each(hashes, buffers_of(hashes)).tolist() == [True] * 6
    assert load_each(store, hashes) == [True] * 6
    orphans = chain(2, 4)[1:]  # linked, and what they continue is not there
    assert store.put_each(orphans, buffers_of(orphans)).tolist() == [False] * 3


def test_put_each_into_a_store_that_is_leased_out_tells_what_was_there_before(store: Store) -> None:
    held = alone(chain(1, SLOTS))
    put(store, held)
    assert store.flush(WAIT_S)
    with store.acquire(held):
        mixed = BlockHashes.of(np.concatenate([chain(2, 1).array, held.array[3:5]]))
        assert store.put_each(mixed, buffers_of(mixed)).tolist() == [False, True, True]


def test_no_hashes_are_no_blocks_by_themselves_either(store: Store) -> None:
    none = alone(chain(1, 0))
    blocks = ContiguousBlocks(np.zeros((1, BLOCK_BYTES), np.uint8))
    assert len(store.contains(none)) == 0
    assert len(store.load_each(none, blocks, [])) == 0
    assert len(store.put_each(none, blocks, [])) == 0


def test_one_load_each_brings_all_that_is_there_also_more_than_dram_holds(
    store: Store, kind: str
) -> None:
    hashes = alone(chain(1, 30))
    for begin in range(0, 30, 10):
        part = hashes[begin : begin + 10]
        assert store.put_each(part, buffers_of(part)).all()
        assert store.flush(WAIT_S)
    there = store.contains(hashes)
    assert np.count_nonzero(there) == (30 if "ssd" in kind else SLOTS)
    assert load_each(store, hashes) == there.tolist()


def test_a_block_that_is_not_there_counts_as_missed_by_load_each_too(store: Store) -> None:
    hashes = alone(chain(1, 6))
    put(store, hashes[:2])
    put(store, hashes[5:])
    load_each(store, hashes)
    load_each(store, alone(chain(2, 4)))
    stats = store.stats()
    assert stats["kvstore_queried_blocks_total"] == 10
    assert stats["kvstore_hit_cpu_blocks_total"] == 3
    assert stats["kvstore_missed_blocks_total"] == 7


# --- a full store


def test_a_full_store_evicts_the_oldest_leaf_first(opened: Open) -> None:
    store = opened(ssd="")
    first, second = chain(1, 8), chain(2, 12)
    put(store, first)
    put(store, second)
    assert load(store, second) == 12
    assert load(store, first) == SLOTS - 12  # the head of the chain is what stayed
    assert store.stats()["kvstore_evicted_cpu_blocks_total"] == 5


def test_a_put_larger_than_the_store_keeps_a_prefix(store: Store) -> None:
    hashes = chain(1, SLOTS + 5)
    result = put(store, hashes)
    assert result.num_no_space == 5
    assert result.num_stored == result.num_blocks == SLOTS
    assert load(store, hashes) == SLOTS


@pytest.mark.parametrize("eviction", ["lru", "lfu", "mq", "s3fifo"])
def test_every_policy_keeps_prefixes_whole(opened: Open, eviction: str) -> None:
    store = opened(eviction=eviction, ssd="")
    chains = [chain(seed, 1 + seed % 7) for seed in range(1, 30)]
    for seed, hashes in enumerate(chains):
        assert put(store, hashes).num_blocks == len(hashes)
        load(store, chains[seed // 2])
    kept = [store.lookup(hashes) for hashes in chains]
    assert sum(hit.num_cpu for hit in kept) == store.stats()["kvstore_cpu_blocks"] == SLOTS


def test_a_leased_block_is_never_evicted(store: Store) -> None:
    held = chain(1, 5)
    put(store, held)
    with store.acquire(held) as lease:
        for seed in range(2, 8):
            put(store, chain(seed, 9))
        room = np.zeros((5, BLOCK_BYTES), np.uint8)
        assert lease.load(ContiguousBlocks(room), np.arange(5)) == 5
        assert_exact(held, room, 5)
        for i in range(5):
            assert np.array_equal(lease.block(i), bytes_of(held[i]))
        assert store.lookup(held) == Hit(5, 5, 0)


def test_refused_while_everything_is_leased_and_stored_after_release(store: Store) -> None:
    held, more = chain(1, SLOTS), chain(2, 4)
    put(store, held)
    assert store.flush(WAIT_S)
    lease = store.acquire(held)
    assert len(lease) == SLOTS
    refused = put(store, more)
    assert (refused.num_stored, refused.num_no_space, refused.num_blocks) == (0, 4, 0)
    assert store.match(more) == 0
    assert store.stats()["kvstore_refused_no_space_blocks_total"] == 4
    lease.release()
    assert put(store, more).num_stored == 4
    assert load(store, more) == 4


def test_a_branch_is_kept_while_the_lease_of_its_leaf_lasts(opened: Open) -> None:
    store = opened(ssd="")
    prefix = chain(1, 5)
    leaf = prefix + chain(2, 1, prefix)
    put(store, leaf)
    with store.acquire(leaf[5:]) as lease:
        assert len(lease) == 1
        for seed in range(3, 9):
            put(store, chain(seed, 9))
        assert load(store, leaf) == 6  # ancestors of a leased block stay as well


# --- leases and pins


def test_an_expired_lease_frees_its_blocks_for_a_put(store: Store, kind: str) -> None:
    held, more = chain(1, SLOTS), chain(2, SLOTS)
    put(store, held)
    assert store.flush(WAIT_S)
    lease = store.acquire(held, ttl=1e-9)
    # Who fetches blocks finds the lease over before they came.
    assert len(lease) == (0 if "tcp" in kind else SLOTS)
    # No acquire comes between: the put itself must see that the holder's time is over.
    assert put(store, more).num_stored == SLOTS
    assert store.stats()["kvstore_leases_expired_total"] >= 1
    count = len(lease)
    room = np.zeros((SLOTS, BLOCK_BYTES), np.uint8)
    if count:
        assert lease.load(ContiguousBlocks(room), np.arange(count)) == 0  # other blocks' bytes now
    lease.release()
    assert load(store, more) == SLOTS


def test_an_expired_lease_counts_only_what_is_still_there(opened: Open, kind: str) -> None:
    store = opened(ssd="")
    held = chain(1, 8)
    put(store, held)
    lease = store.acquire(held, ttl=1e-9)
    put(store, chain(2, SLOTS - 5))  # three of eight must go, the tail
    count = len(lease)  # who fetches blocks finds the lease over before they came
    room = np.zeros((SLOTS, BLOCK_BYTES), np.uint8)
    loaded = lease.load(ContiguousBlocks(room), np.arange(count)) if count else 0
    assert loaded == (0 if "tcp" in kind else 5)
    assert_exact(held, room, loaded)


def test_two_leases_on_a_block_are_counted(store: Store) -> None:
    held = chain(1, SLOTS)
    put(store, held)
    assert store.flush(WAIT_S)
    first, second = store.acquire(held), store.acquire(held)
    assert store.stats()["kvstore_leases"] == 2
    first.release()
    first.release()
    assert put(store, chain(2, 1)).num_no_space == 1
    second.release()
    assert put(store, chain(2, 1)).num_stored == 1
    assert store.flush(WAIT_S)
    assert store.stats()["kvstore_leases"] == 0


def test_a_released_lease_is_closed(store: Store) -> None:
    hashes = chain(1, 2)
    put(store, hashes)
    lease = store.acquire(hashes)
    lease.release()
    room = ContiguousBlocks(np.zeros((2, BLOCK_BYTES), np.uint8))
    with pytest.raises(StoreClosedError, match="lease"):
        lease.load(room, [0, 1])
    with pytest.raises(StoreClosedError, match="lease"):
        lease.block(0)


def test_a_lease_loads_layer_by_layer_and_parts(store: Store) -> None:
    hashes = chain(1, 4)
    put(store, hashes)
    room, pool = paged(4)
    with store.acquire(hashes) as lease:
        for layer in range(4):
            assert lease.load(pool, [3, 2], first=2, layers=(layer, layer + 1)) == 2
        with pytest.raises(ConfigError, match="pinned"):
            lease.load(pool, [0, 1], first=3)
        with pytest.raises(ConfigError, match="layers"):
            lease.load(pool, [0], layers=(3, 5))
    assert np.array_equal(room[3], bytes_of(hashes[2]))
    assert np.array_equal(room[2], bytes_of(hashes[3]))


def test_a_leased_blocks_view_cannot_be_written(store: Store) -> None:
    hashes = chain(1, 1)
    put(store, hashes)
    with store.acquire(hashes) as lease:
        view = lease.block(0)
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        with pytest.raises(IndexError):
            lease.block(1)


def test_pinned_blocks_stay_until_unpinned(store: Store) -> None:
    hashes = chain(1, 6)
    put(store, hashes)
    assert store.pin(hashes) == 6
    for seed in range(2, 8):
        put(store, chain(seed, 9))
    assert store.lookup(hashes) == Hit(6, 6, 0)
    store.unpin(hashes)
    assert store.flush(WAIT_S)
    assert store.stats()["kvstore_leases"] == 0
    put(store, chain(9, SLOTS))
    assert store.lookup(hashes).num_cpu == 0


# --- removing


def test_removing_a_block_removes_what_continues_it(store: Store) -> None:
    prefix = chain(1, 4)
    left, right = prefix + chain(2, 2, prefix), prefix + chain(3, 2, prefix)
    other = chain(4, 2)
    for hashes in (left, right, other):
        put(store, hashes)
    assert store.remove(left[2:3]) == 1
    assert store.match(left) == store.match(right) == 2
    assert load(store, other) == 2
    assert put(store, right).num_stored == 4
    assert load(store, right) == 6


def test_a_lease_outlives_removal(store: Store) -> None:
    hashes = chain(1, 4)
    put(store, hashes)
    lease = store.acquire(hashes)
    assert store.remove(hashes) >= 1
    assert store.match(hashes) == 0
    put(store, chain(2, SLOTS))  # the detached blocks keep their slots
    room = np.zeros((4, BLOCK_BYTES), np.uint8)
    assert lease.load(ContiguousBlocks(room), np.arange(4)) == 4
    assert_exact(hashes, room, 4)
    lease.release()
    assert store.flush(WAIT_S)
    assert put(store, chain(3, SLOTS)).num_stored == SLOTS


def test_clear_leaves_nothing(store: Store) -> None:
    first, second = chain(1, 5), chain(2, 5)
    put(store, first)
    put(store, BlockHashes.of(second.array))
    assert store.flush(WAIT_S)  # a block that is being written out is freed after that
    store.clear()
    assert store.match(first) == store.match(second) == 0
    assert store.stats()["kvstore_cpu_used_bytes"] == 0
    assert put(store, first).num_stored == 5
    assert load(store, first) == 5


# --- two-phase puts


def test_reserved_blocks_are_invisible_until_commit(store: Store) -> None:
    hashes = chain(1, 4)
    put(store, hashes[:1])
    with store.reserve(hashes) as reservation:
        assert reservation.wanted.tolist() == [False, True, True, True]
        _, pool = paged(3, list(hashes[1:]))
        reservation.write(pool, [0, 1, 2])
        assert store.match(hashes) == 1
        result = reservation.commit().wait(WAIT_S)
    assert (result.num_stored, result.num_present, result.num_blocks) == (3, 1, 4)
    assert load(store, hashes) == 4


def test_layers_may_be_written_one_by_one_in_any_order(store: Store) -> None:
    hashes = chain(1, 3)
    _, pool = paged(3, list(hashes))
    with store.reserve(hashes) as reservation:
        for layers in ((2, 4), (0, 1), (1, 2)):
            reservation.write(pool, [0, 1, 2], layers=layers)
        reservation.commit()
    assert load(store, hashes) == 3


def test_a_block_with_unwritten_layers_is_not_published(store: Store) -> None:
    put(store, chain(9, SLOTS))
    assert store.flush()  # write-behind holds no slot any more
    store.clear()  # the slots hold another's bytes
    hashes = chain(1, 2)
    _, pool = paged(2, list(hashes))
    with store.reserve(hashes) as reservation:
        reservation.write(pool, [0, 1], layers=(0, 2))
        reservation.write(pool, [0, 1], layers=(3, 4))
        with pytest.raises(ConfigError, match="bytes 32768 to 49152"):
            reservation.commit()
        reservation.write(pool, [0, 1], layers=(2, 3))
        reservation.commit()
    assert load(store, hashes) == 2


def test_leaving_without_commit_aborts(store: Store) -> None:
    hashes = chain(1, SLOTS)
    with store.reserve(hashes):
        pass
    assert store.match(hashes) == 0
    assert store.stats()["kvstore_cpu_used_bytes"] == 0
    assert put(store, hashes).num_stored == SLOTS


def test_a_reservation_ends_once(store: Store) -> None:
    hashes = chain(1, 2)
    _, pool = paged(2, list(hashes))
    aborted = store.reserve(hashes)
    aborted.abort()
    aborted.abort()
    with pytest.raises(StoreClosedError, match="reservation"):
        aborted.commit()
    with pytest.raises(StoreClosedError, match="reservation"):
        aborted.write(pool, [0, 1])
    done = store.reserve(hashes)
    done.write(pool, [0, 1])
    done.commit()
    with pytest.raises(StoreClosedError, match="reservation"):
        done.commit()
    done.abort()
    assert load(store, hashes) == 2


def test_a_reservation_with_nothing_to_write_says_what_is_there(store: Store) -> None:
    hashes = chain(1, 2)
    put(store, hashes)
    with store.reserve(hashes) as reservation:
        assert not reservation.wanted.any()
        result = reservation.commit().wait(WAIT_S)
    assert (result.num_present, result.num_blocks) == (2, 2)


def test_a_second_writer_of_a_block_is_told_that_it_is_pending(store: Store) -> None:
    hashes = chain(1, 4)
    _, pool = paged(2, list(hashes[:2]))
    with store.reserve(hashes[:2]) as first:
        second = put(store, hashes)
        assert (second.num_pending, second.num_stored) == (2, 2)
        assert store.match(hashes) == 0  # complete, but not reachable yet
        first.write(pool, [0, 1])
        first.commit()
        assert store.match(hashes) == 4
    assert load(store, hashes) == 4


def test_aborting_a_block_takes_those_that_waited_for_it(store: Store) -> None:
    hashes = chain(1, 4)
    with store.reserve(hashes[:2]):
        put(store, hashes)
    assert store.match(hashes) == store.match(hashes[2:]) == 0
    assert store.stats()["kvstore_cpu_used_bytes"] == 0
    assert put(store, hashes).num_stored == 4


def test_removal_reaches_blocks_that_are_being_written(store: Store) -> None:
    hashes = chain(1, 3)
    _, pool = paged(3, list(hashes))
    with store.reserve(hashes) as reservation:
        assert store.remove(hashes[:1]) == 1
        reservation.write(pool, [0, 1, 2])
        reservation.commit()
    assert store.match(hashes) == 0
    assert store.stats()["kvstore_cpu_used_bytes"] == 0


def test_wait_for_sees_a_commit_of_another_thread(store: Store) -> None:
    hashes = chain(1, 4)
    _, pool = paged(4, list(hashes))
    waiting = threading.Event()

    def reader() -> int:
        waiting.set()
        return store.wait_for(hashes, timeout=WAIT_S)

    with ThreadPoolExecutor(1) as pool_of_one, store.reserve(hashes) as reservation:
        found = pool_of_one.submit(reader)
        assert waiting.wait(WAIT_S)
        reservation.write(pool, [0, 1, 2, 3])
        reservation.commit()
        assert found.result(WAIT_S) == 4
    assert store.wait_for(chain(2, 3), timeout=0.0) == 0
    assert store.wait_for(hashes, 2, timeout=0.0) >= 2


def test_a_put_that_waits_for_room_gets_it_when_a_lease_ends(store: Store) -> None:
    held, more = chain(1, SLOTS), chain(2, 6)
    put(store, held)
    assert store.flush(WAIT_S)
    lease = store.acquire(held)
    assert put(store, more, wait=0.01).num_no_space == 6  # in vain
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(put, store, more, wait=WAIT_S)
        refused = store.stats()["kvstore_refused_no_space_blocks_total"]
        assert refused >= 6
        lease.release()
        result = waiting.result(WAIT_S)
    assert (result.num_blocks, result.num_stored, result.num_no_space) == (6, 6, 0)
    assert load(store, more) == 6


def test_a_put_with_room_for_a_part_stores_it_before_it_waits(store: Store) -> None:
    held, more = chain(1, SLOTS - 2), chain(2, 6)
    put(store, held)
    assert store.flush(WAIT_S)
    lease = store.acquire(held)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(put, store, more, wait=WAIT_S)
        assert store.wait_for(more, 2, timeout=WAIT_S) == 2
        lease.release()
        assert waiting.result(WAIT_S).num_stored == 6
    assert load(store, more) == 6
    assert store.flush(WAIT_S)
    assert put(store, chain(3, SLOTS + 2), wait=0.01).num_stored == SLOTS  # what can never fit


# --- levels and background


def test_background_transfers_are_waited_for_and_awaited(store: Store) -> None:
    hashes = chain(1, 6)
    source = buffers_of(hashes)
    room = np.zeros((6, BLOCK_BYTES), np.uint8)

    async def both() -> int:
        stored = await store.put(hashes, source, background=True)
        assert stored.num_stored == 6
        loaded = await store.load(hashes, ContiguousBlocks(room), background=True)
        again = await store.load(hashes, ContiguousBlocks(room))
        assert again.num_blocks == loaded.num_blocks
        return loaded.num_blocks

    assert asyncio.run(both()) == 6
    assert_exact(hashes, room, 6)
    called = threading.Event()
    transfer = store.load(hashes, ContiguousBlocks(room), background=True)
    transfer.then(called.set)
    assert transfer.wait(WAIT_S).num_blocks == 6
    assert transfer.done()
    assert called.wait(WAIT_S)


def test_giving_up_an_await_leaves_the_transfer_running(store: Store) -> None:
    hashes = chain(1, 3)
    gate = threading.Event()

    async def give_up() -> None:
        # The pool has two threads; while both wait, the put cannot start.
        for _ in range(2):
            store._submit(gate.wait)
        transfer = store.put(hashes, buffers_of(hashes), background=True)
        with pytest.raises(DeadlineExceededError):
            transfer.wait(0.0)
        waiting = asyncio.ensure_future(_of(transfer))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        gate.set()
        assert (await transfer).num_stored == 3

    async def _of(transfer: Any) -> Any:
        return await transfer

    asyncio.run(give_up())
    assert load(store, hashes) == 3


@pytest.mark.parametrize("ack", ["memory", "ssd", "durable"])
def test_the_level_that_was_reached_is_named(store: Store, kind: str, ack: str) -> None:
    hashes = chain(1, 6)
    expected = ack if "ssd" in kind else "memory"
    result = put(store, hashes, ack=ack)
    assert (result.num_stored, result.num_blocks, result.ack) == (6, 6, expected)
    assert put(store, hashes, ack=ack).ack == expected
    _, pool = paged(2, list(chain(2, 2)))
    with store.reserve(chain(2, 2)) as reservation:
        reservation.write(pool, [0, 1])
        assert reservation.commit(ack).wait(WAIT_S).ack == expected  # type: ignore[arg-type]
    with store.reserve(chain(2, 2)) as reservation:
        assert reservation.commit(ack).wait(WAIT_S).ack == expected  # type: ignore[arg-type]
    assert load(store, hashes) == 6


def test_flush_and_prefetch_bring_blocks_down_and_up(store: Store, kind: str) -> None:
    first, second = chain(1, 12), chain(2, 12)
    put(store, first)
    assert store.flush(WAIT_S)
    put(store, second)
    assert store.flush(WAIT_S)
    result = store.prefetch(first).wait(WAIT_S)
    if "ssd" in kind:
        assert result.num_blocks == 12
        assert store.lookup(first) == Hit(12, 12, 0)
        assert store.lookup(second, prefetch=True).num_blocks == 12
        assert load(store, second) == 12  # from where it lies
    else:
        assert result.num_blocks == store.match(first) == SLOTS - 12


# --- watching


def test_events_tell_what_vllm_is_told(store: Store) -> None:
    hashes = chain(1, 4)
    assert list(store.events()) == []
    put(store, hashes[:2])
    put(store, hashes[2:])
    store.flush(WAIT_S)
    events = [e for e in store.events() if not isinstance(e, BlockStored) or e.medium == "CPU"]
    assert all(isinstance(e, BlockStored) for e in events)
    stored = [(e.block_hashes, e.parent_block_hash) for e in events if isinstance(e, BlockStored)]
    told = [h for block_hashes, _ in stored for h in block_hashes]
    assert told == list(hashes)
    assert stored[0][1] is None
    assert all(e.block_size == 32 for e in events if isinstance(e, BlockStored))
    store.remove(hashes[1:2])
    removed = [e for e in store.events() if isinstance(e, BlockRemoved) and e.medium == "CPU"]
    gone = [h for e in removed for h in e.block_hashes]
    assert sorted(gone) == sorted(hashes[1:])
    assert gone.index(hashes[3]) < gone.index(hashes[2]) < gone.index(hashes[1])
    store.clear()
    assert [type(e) for e in store.events()] == [AllBlocksCleared]


def test_a_slice_is_announced_with_its_parent(store: Store) -> None:
    hashes = chain(1, 4)
    put(store, hashes[:2])
    list(store.events())
    put(store, hashes[2:])
    stored = [e for e in store.events() if isinstance(e, BlockStored) and e.medium == "CPU"]
    event = stored[0]
    assert event.parent_block_hash == hashes[1]
    assert event.block_hashes == list(hashes[2:])


def test_events_are_numbered_without_gaps(opened: Open) -> None:
    store = opened(ssd="")
    seen = 0
    list(store.events())
    for seed in range(1, 12):
        put(store, chain(seed, 5))
        for event in store.events():
            count = len(getattr(event, "block_hashes", [0]))
            if seen:
                assert event.sequence - count == seen
            seen = event.sequence
    resident = SLOTS
    assert seen >= 11 * 5 + (11 * 5 - resident)


def test_stats_add_up(store: Store) -> None:
    hashes = chain(1, 6)
    put(store, hashes[:4])
    load(store, hashes[:4])  # all
    load(store, hashes)  # some
    load(store, chain(2, 3))  # none
    store.acquire(hashes).release()
    assert store.flush(WAIT_S)
    stats = store.stats()
    hits = stats["kvstore_hit_cpu_blocks_total"] + stats["kvstore_hit_ssd_blocks_total"]
    assert stats["kvstore_queried_blocks_total"] == 4 + 6 + 3 + 6
    assert hits == 4 + 4 + 0 + 4
    assert stats["kvstore_missed_blocks_total"] == 0 + 2 + 3 + 2
    assert stats["kvstore_stored_bytes_total"] == 4 * BLOCK_BYTES
    assert stats["kvstore_cpu_blocks"] * BLOCK_BYTES == stats["kvstore_cpu_used_bytes"]
    assert stats["kvstore_cpu_used_bytes"] == 4 * BLOCK_BYTES
    assert stats["kvstore_leases"] == 0
    assert stats["kvstore_integrity_failures_total"] == 0


# --- integrity


def flip(owner: Store, hashes: BlockHashes, index: int, byte: int) -> None:
    """Change one bit of a block in the memory of the process that holds it."""
    with owner.acquire(hashes) as lease:
        at = lease.block(index).ctypes.data
    control = owner.control
    assert isinstance(control, LocalControl)
    control.arena[at - control.arena.ctypes.data + byte] ^= 4


def test_a_flipped_bit_in_dram_is_a_miss_when_every_read_is_checked(
    opened: Open, kind: str, owners: list[Store]
) -> None:
    store = opened(verify="always")
    owner = owners[0]
    hashes = chain(1, 5)
    put(store, hashes)
    with store.acquire(hashes) as lease:
        flip(owner, hashes, 3, 77)
        room = np.zeros((5, BLOCK_BYTES), np.uint8)
        # What was fetched before is whole.
        assert lease.load(ContiguousBlocks(room), np.arange(5)) == (5 if "tcp" in kind else 3)
    assert load(store, hashes) == 3
    assert store.stats()["kvstore_integrity_failures_total"] == 1
    assert put(store, hashes).num_stored == 2
    flip(owner, hashes, 4, 0)
    assert load(store, hashes) == 4
    assert store.stats()["kvstore_integrity_failures_total"] == 2


def test_a_flipped_bit_is_a_miss_in_a_load_by_layers_too(opened: Open, owners: list[Store]) -> None:
    store = opened(verify="always")
    hashes = chain(1, 4)
    _, source = paged(4, list(hashes))
    store.put(hashes, source).wait()
    _, pool = paged(4, list(hashes))
    with store.acquire(hashes) as lease:
        assert lease.load(pool, [0, 1, 2, 3], layers=(0, 1)) == 4
    flip(owners[0], hashes, 2, BLOCK_BYTES - 1)  # in the last layer
    with store.acquire(hashes) as lease:
        count = len(lease)  # who fetches blocks checks them then
        assert lease.load(pool, list(range(count)), layers=(0, 1)) == 2
        assert lease.load(pool, [0, 1], layers=(1, 4)) == 2
    assert store.match(hashes) == 2
    assert store.stats()["kvstore_integrity_failures_total"] == 1


# --- the end


def test_every_use_after_close_is_an_error(store: Store) -> None:
    hashes = chain(1, 2)
    put(store, hashes)
    blocks = buffers_of(hashes)
    store.close()
    store.close()
    uses: list[Callable[[], object]] = [
        lambda: store.match(hashes),
        lambda: store.lookup(hashes),
        lambda: store.wait_for(hashes, timeout=0.0),
        lambda: store.acquire(hashes),
        lambda: store.load(hashes, blocks),
        lambda: store.load(hashes, blocks, background=True),
        lambda: store.put(hashes, blocks),
        lambda: store.put(hashes, blocks, ack="ssd"),
        lambda: store.put(hashes, blocks, background=True),
        lambda: store.contains(hashes),
        lambda: store.load_each(hashes, blocks),
        lambda: store.put_each(hashes, blocks),
        lambda: store.prefetch(hashes),
        lambda: store.reserve(hashes),
        lambda: store.pin(hashes),
        lambda: store.unpin(hashes),
        lambda: store.remove(hashes),
        store.clear,
        store.events,
        store.stats,
        store.flush,
    ]
    for use in uses:
        with pytest.raises(StoreClosedError, match="closed"):
            use()


def test_leases_and_reservations_that_outlive_the_store_are_closed(opened: Open) -> None:
    store = opened()
    hashes = chain(1, 3)
    put(store, hashes)
    lease = store.acquire(hashes)
    view = lease.block(0)
    reservation = store.reserve(chain(2, 2))
    _, pool = paged(3, list(hashes))
    store.close()
    del store
    with pytest.raises(StoreClosedError):
        lease.load(pool, [0, 1, 2])
    with pytest.raises(StoreClosedError):
        lease.block(0)
    with pytest.raises(StoreClosedError):
        reservation.write(pool, [0, 1])
    with pytest.raises(StoreClosedError):
        reservation.commit()
    reservation.abort()
    lease.release()
    assert np.array_equal(view, bytes_of(hashes[0]))  # mapped as long as the view lives


def test_leaving_a_reservation_after_close_hides_no_other_error(opened: Open) -> None:
    store = opened()

    def fail() -> None:
        with store.reserve(chain(1, 2)), store.acquire(chain(1, 2)):
            store.close()
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_close_waits_for_background_transfers(store: Store) -> None:
    chains = [chain(seed, 3) for seed in range(1, 6)]  # all fit
    transfers = [store.put(hashes, buffers_of(hashes), background=True) for hashes in chains]
    store.close()
    assert all(transfer.done() for transfer in transfers)
    assert all(transfer.wait(0).num_stored == 3 for transfer in transfers)


def test_closing_under_load_is_a_result_or_a_closed_error(opened: Open) -> None:
    store = opened()
    hashes = chain(1, 6)
    source = buffers_of(hashes)
    started = threading.Barrier(5)

    def work(turn: int) -> int:
        room = np.zeros((6, BLOCK_BYTES), np.uint8)
        started.wait(WAIT_S)
        done = 0
        try:
            while True:
                if turn % 2:
                    store.put(hashes, source).wait(WAIT_S)
                else:
                    count = store.load(hashes, ContiguousBlocks(room)).wait(WAIT_S).num_blocks
                    assert_exact(hashes, room, count)
                store.prefetch(hashes).wait(WAIT_S)
                done += 1
        except StoreClosedError:
            return done

    with ThreadPoolExecutor(4) as threads:
        works = [threads.submit(work, turn) for turn in range(4)]
        started.wait(WAIT_S)
        store.wait_for(hashes, timeout=WAIT_S)
        store.close()
        for result in works:
            result.result(WAIT_S)


def test_close_waits_for_a_put_on_another_thread(opened: Open) -> None:
    store = opened()
    inside, gate = threading.Event(), threading.Event()
    source = buffers_of(chain(1, 3))

    class Slow(ContiguousBlocks):
        def __init__(self) -> None:
            self.__dict__.update(source.__dict__)

        def require_block_bytes(self, block_bytes: int) -> None:
            pass  # looks at the plan as well

        def __getattribute__(self, name: str) -> Any:
            if name == "plan" and threading.current_thread() is not threading.main_thread():
                inside.set()
                assert gate.wait(WAIT_S)
            return super().__getattribute__(name)

    ended: list[str] = []
    control = store.control
    close = control.close
    control.close = lambda *args: (ended.append("slots given back"), close(*args))  # type: ignore
    with ThreadPoolExecutor(2) as threads:
        slow = Slow()
        putting = threads.submit(lambda: store.put(chain(1, 3), slow).wait(WAIT_S))
        putting.add_done_callback(lambda _: ended.append("put"))
        assert inside.wait(WAIT_S)
        closing = threads.submit(store.close)
        while not store._writers.is_closed:
            pass
        assert not ended
        gate.set()
        assert putting.result(WAIT_S).num_stored == 3
        closing.result(WAIT_S)
    assert sorted(ended) == ["put", "slots given back"]


def test_threads_that_share_a_store_see_only_exact_bytes(store: Store) -> None:
    chains = [chain(seed, 1 + seed % 6) for seed in range(12)]
    sources = [payload(hashes) for hashes in chains]

    def work(seed: int) -> int:
        dice = np.random.default_rng(seed)
        loaded = 0
        for _ in range(60):
            which = int(dice.integers(len(chains)))
            hashes, source = chains[which], sources[which]
            choice = dice.integers(10)
            if choice < 4:
                store.put(hashes, ContiguousBlocks(source)).wait(WAIT_S)
            elif choice < 7:
                room = np.zeros_like(source)
                count = store.load(hashes, ContiguousBlocks(room)).wait(WAIT_S).num_blocks
                assert np.array_equal(room[:count], source[:count])
                loaded += count
            elif choice == 7:
                with store.acquire(hashes) as lease:
                    for i in range(len(lease)):
                        assert np.array_equal(lease.block(i), source[i])
            elif choice == 8:
                store.remove(hashes[int(dice.integers(len(hashes))) :])
            else:
                with store.reserve(hashes) as reservation:
                    wanted = np.flatnonzero(reservation.wanted)
                    reservation.write(ContiguousBlocks(source), wanted)
                    if dice.integers(2):
                        reservation.commit()
        return loaded

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(work, range(4))) > 0
    assert store.flush(WAIT_S)
    stats = store.stats()
    assert stats["kvstore_leases"] == 0
    queried = stats["kvstore_queried_blocks_total"]
    hits = stats["kvstore_hit_cpu_blocks_total"] + stats["kvstore_hit_ssd_blocks_total"]
    assert queried == hits + stats["kvstore_missed_blocks_total"]
    store.clear()
    assert store.stats()["kvstore_cpu_used_bytes"] == 0
