"""The whole store against a dict, with an ssd of a few segments, reopening and damage.

The model holds what was put. A miss is always allowed; other bytes than were put never are. Bits
are flipped in ssd files while the store is closed, and in the arena when every read is checked.
"""

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

import kvstore
from kvstore import BlockHashes, BlockSpec, ContiguousBlocks, KVStoreError, Namespace
from kvstore.tiers.local import LocalControl
from tests.store_support import WAIT_S, bytes_of, chain

SPEC = BlockSpec(num_layers=2, num_kv_heads=1, head_dim=64, block_tokens=16, dtype="float32")
SIZE = SPEC.block_bytes
NAMESPACES = [Namespace("model", SPEC), Namespace("model", SPEC, lora="adapter")]
# Chains that share a prefix of four blocks, and their bytes, which compress by half.
PREFIX = chain(1, 4)
CHAINS = [PREFIX + chain(seed, 8, PREFIX) for seed in range(2, 8)]
WHICH = st.integers(0, len(CHAINS) - 1)
PLACE = st.integers(0, 11)


def payload_of(block_hash: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    block = bytes_of(block_hash, SIZE)
    block[SIZE // 2 :] = block_hash[0]
    return block


PAYLOAD = {h: payload_of(h) for hashes in CHAINS for h in hashes}


class StoreModel(RuleBasedStateMachine):
    store: kvstore.Store

    @initialize(
        codec=st.sampled_from(["none", "none", "zstd"]),
        verify=st.sampled_from(["boundary", "always"]),
        eviction=st.sampled_from(["lru", "lfu", "mq", "s3fifo"]),
        write_behind=st.sampled_from([4 * SIZE, 1 << 28]),
        ssd_admission=st.sampled_from(["all", "all", "reuse"]),
        ssd_write_budget=st.sampled_from([0, 0, 8 * SIZE]),
    )
    def open_first(self, **settings: Any) -> None:
        self.directory = tempfile.mkdtemp(prefix="kvstore-model-")
        self.settings = {
            "cpu": "1MiB",
            "chunk": "256KiB",
            "ssd": self.directory + "/ssd",
            "ssd_segment": "256KiB",
            "ssd_capacity": "1MiB",
            **settings,
        }
        self.which = 0
        self.store = kvstore.open(NAMESPACES[0], **self.settings)
        self.put_blocks: list[set[bytes]] = [set(), set()]  # by namespace, since it was cleared
        self.leases: list[tuple[kvstore.Lease, BlockHashes]] = []

    def _chain(self, which: int, first: int, last: int) -> BlockHashes:
        return CHAINS[which][min(first, last) : max(first, last) + 1]

    @rule(
        which=WHICH, first=PLACE, last=PLACE, linked=st.booleans(),
        ack=st.sampled_from(["memory", "memory", "ssd", "durable"]), background=st.booleans(),
    )  # fmt: skip
    def put(
        self, which: int, first: int, last: int, linked: bool, ack: Any, background: bool
    ) -> None:
        hashes = self._chain(which, 0 if which % 2 else first, last)
        if not linked:
            hashes = BlockHashes.of(hashes.array)
        source = np.stack([PAYLOAD[h] for h in hashes])
        result = self.store.put(
            hashes, ContiguousBlocks(source), ack=ack, background=background
        ).wait(WAIT_S)
        counts = (result.num_stored, result.num_present, result.num_pending)
        assert sum(counts) + result.num_no_space + result.num_orphan == len(hashes)
        assert result.ack in ("memory", ack)
        self.put_blocks[self.which] |= set(hashes)

    @rule(which=WHICH, first=PLACE, last=PLACE, background=st.booleans())
    def load(self, which: int, first: int, last: int, background: bool) -> None:
        hashes = self._chain(which, first, last)
        room = np.zeros((len(hashes), SIZE), np.uint8)
        result = self.store.load(hashes, ContiguousBlocks(room), background=background).wait(WAIT_S)
        for i in range(result.num_blocks):
            assert hashes[i] in self.put_blocks[self.which]
            assert np.array_equal(room[i], PAYLOAD[hashes[i]])

    @rule(which=WHICH)
    def prefetch(self, which: int) -> None:
        self.store.prefetch(CHAINS[which]).wait(WAIT_S)

    @precondition(lambda self: len(getattr(self, "leases", [0] * 3)) < 3)
    @rule(which=WHICH, first=PLACE, last=PLACE)
    def acquire(self, which: int, first: int, last: int) -> None:
        hashes = self._chain(which, first, last)
        self.leases.append((self.store.acquire(hashes), hashes))

    @precondition(lambda self: bool(getattr(self, "leases", None)))
    @rule()
    def release(self) -> None:
        lease, _ = self.leases.pop(0)
        lease.release()

    @rule(which=WHICH, place=PLACE)
    def remove(self, which: int, place: int) -> None:
        self.store.remove(CHAINS[which][place : place + 1])
        self.put_blocks[self.which].discard(CHAINS[which][place])
        assert self.store.match(CHAINS[which][place : place + 1]) == 0

    @rule()
    def clear(self) -> None:
        self.store.clear()
        self.put_blocks[self.which].clear()

    @rule()
    def flush(self) -> None:
        assert self.store.flush(WAIT_S)

    @rule(other=st.booleans(), codec=st.sampled_from(["none", "zstd"]))
    def reopen(self, other: bool, codec: str) -> None:
        self.leases.clear()
        self.store.close()
        self.which ^= other
        self.settings["codec"] = codec
        self.store = kvstore.open(NAMESPACES[self.which], **self.settings)

    @rule(seed=st.integers(0, 1 << 30), flips=st.integers(1, 4), index=st.booleans())
    def flip_bits_on_ssd(self, seed: int, flips: int, index: bool) -> None:
        self.leases.clear()
        self.store.close()
        dice = random.Random(seed)
        files = [
            path
            for path in sorted(Path(self.directory).rglob("*"))
            if path.is_file()
            and path.stat().st_size > 0
            and (path.name == "data.mdb") == index
            and path.stat().st_blocks > 0
        ]
        for _ in range(flips if files else 0):
            path = dice.choice(files)
            with path.open("r+b") as file:
                at = dice.randrange(path.stat().st_size)
                file.seek(at)
                byte = file.read(1)[0] ^ (1 << dice.randrange(8))
                file.seek(at)
                file.write(bytes([byte]))
        try:
            self.store = kvstore.open(NAMESPACES[self.which], **self.settings)
        except KVStoreError:  # refused with a clear error, which is right as well; start again
            shutil.rmtree(self.settings["ssd"])
            self.store = kvstore.open(NAMESPACES[self.which], **self.settings)
        # A record of a removed block that was damaged may be found again in its segment.
        self.put_blocks = [set(PAYLOAD), set(PAYLOAD)]

    @precondition(lambda self: getattr(self, "settings", {}).get("verify") == "always")
    @rule(seed=st.integers(0, 1 << 30))
    def flip_bits_in_dram(self, seed: int) -> None:
        if self.leases:
            return
        assert self.store.flush(WAIT_S)
        dice = random.Random(seed)
        control = self.store.control
        assert isinstance(control, LocalControl)
        arena = control.arena
        for hashes in CHAINS:
            with self.store.acquire(hashes[:1]) as lease:
                if len(lease) and dice.random() < 0.5:
                    begin = lease.block(0).ctypes.data - arena.ctypes.data
                    arena[begin + dice.randrange(SIZE)] ^= 1 << dice.randrange(8)

    @precondition(lambda self: bool(getattr(self, "leases", None)))
    @invariant()
    def leased_bytes_stay(self) -> None:
        for lease, hashes in self.leases:
            if self.settings["verify"] == "boundary":
                for i in range(len(lease)):
                    assert np.array_equal(lease.block(i), PAYLOAD[hashes[i]])

    @precondition(lambda self: hasattr(self, "store"))
    @invariant()
    def counts_add_up(self) -> None:
        stats = self.store.stats()
        hits = stats["kvstore_hit_cpu_blocks_total"] + stats["kvstore_hit_ssd_blocks_total"]
        assert stats["kvstore_queried_blocks_total"] == hits + stats["kvstore_missed_blocks_total"]
        assert stats["kvstore_ssd_used_bytes"] <= stats["kvstore_ssd_capacity_bytes"]
        assert stats["kvstore_cpu_used_bytes"] <= stats["kvstore_cpu_capacity_bytes"]
        assert stats["kvstore_background_errors_total"] == 0

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        for lease, _ in self.leases:
            lease.release()
        self.store.clear()
        assert self.store.flush(WAIT_S)
        stats = self.store.stats()
        assert stats["kvstore_leases"] == 0
        assert stats["kvstore_cpu_used_bytes"] == 0  # the other namespace lies on ssd only
        self.store.close()
        shutil.rmtree(self.directory)


StoreModel.TestCase.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
TestStoreModel = StoreModel.TestCase
