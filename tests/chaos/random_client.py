"""A client that does random things with a daemon's store and checks every byte it is given.

Run as a program by test_chaos.py:
    python -m tests.chaos.random_client ADDRESS SEED TOKEN_FILE
Each block's bytes follow from its hash, so any load can be checked alone. Lines on stdout, JSON:
    {"beat": n}                       some calls went well
    {"slow": name, "begin": s, "end": s}   a call that took longer than it may (monotonic clock; the
                                      conductor forgives those during which it had stopped us)
    {"wrong": text}                   bytes that are not what was put, or an error that is not ours
Ends when stdin closes: then it lets go of all that it holds and says {"done": calls}.
"""

from __future__ import annotations

import contextlib
import json
import random
import select
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

import kvstore
from kvstore import BlockHashes, BlockSpec, ContiguousBlocks, KVStoreError, Namespace, Store

SPEC = BlockSpec(num_layers=2, num_kv_heads=1, head_dim=64, block_tokens=16, dtype="float32")
NAMESPACE = Namespace("chaos", SPEC)
NUM_DOCUMENTS = 24
DOCUMENT_BLOCKS = 40
TIMEOUT_S = 1.0  # of a call, beyond what the call itself may wait
WAIT_S = 0.5
# Beyond the deadline: two cores, a dozen processes, a scheduler.
SLACK_S = 4.0
BEAT_CALLS = 50
ACKS: tuple[Literal["ssd", "durable"], ...] = ("ssd", "durable")


def document(number: int) -> BlockHashes:
    tokens = np.arange(DOCUMENT_BLOCKS * SPEC.block_tokens, dtype=np.int64) + number * 1_000_000
    return kvstore.hash_blocks(tokens, SPEC.block_tokens)


DOCUMENTS = [document(number) for number in range(NUM_DOCUMENTS)]


def bytes_of(block_hash: bytes) -> np.ndarray:
    seed = int.from_bytes(block_hash[:8], "little")
    return np.random.default_rng(seed).integers(0, 256, SPEC.block_bytes, dtype=np.uint8)


def payload(hashes: BlockHashes) -> np.ndarray:
    return np.stack([bytes_of(h) for h in hashes])


class WrongBytes(Exception):
    pass


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


class RandomClient:
    def __init__(self, address: str, seed: int, token_file: str) -> None:
        self._random = random.Random(seed)
        self._address = address
        self._token_file = token_file
        self._store = self._connect()
        self._leases: list[tuple[kvstore.Lease, BlockHashes]] = []
        self.num_calls = 0
        self._calls: list[tuple[Callable[[], None], float, int]] = [
            # what, seconds that it may wait itself, weight
            (self.load, WAIT_S, 30),
            (self.put, 0.0, 24),
            (self.put_to_ssd, 12.0, 4),
            (self.lookup, 0.0, 10),
            (self.hold, WAIT_S, 6),
            (self.look_at_held, 0.0, 6),
            (self.let_go, 0.0, 6),
            (self.write_in_layers, 0.0, 5),
            (self.give_up_a_write, 0.0, 4),
            (self.pin, WAIT_S, 2),
            (self.wait_for, WAIT_S, 2),
            (self.remove, 0.0, 3),
            (self.prefetch, 0.0, 3),
            (self.stats, 0.0, 2),
            (self.connect_anew, 3.0, 1),
        ]

    def _connect(self) -> Store:
        token = None if self._address.startswith("unix:") else Path(self._token_file)
        while True:
            try:
                return kvstore.connect(self._address, NAMESPACE, timeout=TIMEOUT_S, token=token)
            except (kvstore.PeerUnavailableError, kvstore.DeadlineExceededError):
                time.sleep(0.05)  # the daemon is dead or stopped: connecting is allowed to fail

    def one_call(self) -> None:
        weights = [weight for _, _, weight in self._calls]
        call, wait, _ = self._random.choices(self._calls, weights)[0]
        begin = time.monotonic()
        # What cannot be answered with a miss may say so, in time.
        with contextlib.suppress(kvstore.PeerUnavailableError, kvstore.DeadlineExceededError):
            call()
        end = time.monotonic()
        # A call makes up to three round trips, each with its own deadline.
        if end - begin > wait + 3 * TIMEOUT_S + SLACK_S and call != self.connect_anew:
            say(slow=call.__name__, begin=begin, end=end)
        self.num_calls += 1

    def _some(self, longest: int = DOCUMENT_BLOCKS) -> BlockHashes:
        chain = self._random.choice(DOCUMENTS)
        return chain[: self._random.randint(1, longest)]

    def load(self) -> None:
        chain = self._some()
        room = np.zeros((len(chain), SPEC.block_bytes), np.uint8)
        result = self._store.load(chain, ContiguousBlocks(room), timeout=WAIT_S).wait(60.0)
        self._check(chain, room, result.num_blocks, "load")

    def _check(self, chain: BlockHashes, room: np.ndarray, count: int, what: str) -> None:
        for i in range(count):
            if not np.array_equal(room[i], bytes_of(chain[i])):
                raise WrongBytes(f"{what}: block {i} of {count}, {chain[i].hex()[:16]}")

    def put(self) -> None:
        chain = self._some()
        self._store.put(chain, ContiguousBlocks(payload(chain))).wait(60.0)

    def put_to_ssd(self) -> None:
        chain = self._some(8)
        blocks = ContiguousBlocks(payload(chain))
        self._store.put(chain, blocks, ack=self._random.choice(ACKS)).wait(60.0)

    def lookup(self) -> None:
        chain = self._some()
        hit = self._store.lookup(chain, prefetch=self._random.random() < 0.3)
        if hit.num_blocks > len(chain):
            raise WrongBytes(f"lookup: {hit.num_blocks} of {len(chain)}")

    def hold(self) -> None:
        chain = self._some(12)
        lease = self._store.acquire(chain, ttl=20.0, timeout=WAIT_S)
        self._leases.append((lease, chain))
        if len(self._leases) > 4:
            self.let_go()

    def look_at_held(self) -> None:
        if not self._leases:
            return
        lease, chain = self._random.choice(self._leases)
        count = len(lease)
        if count == 0:
            return
        room = np.stack([lease.block(i).copy() for i in range(count)])
        # A daemon that was killed meanwhile no longer knows of the lease: what was read counts
        # only as far as the blocks are still there afterwards.
        self._check(chain, room, lease.num_intact(), "view")
        room[:] = 0
        loaded = lease.load(ContiguousBlocks(room), np.arange(count))
        self._check(chain, room, loaded, "lease.load")

    def let_go(self) -> None:
        if self._leases:
            lease, _ = self._leases.pop(self._random.randrange(len(self._leases)))
            lease.release()

    def write_in_layers(self) -> None:
        chain = self._some(10)
        with self._store.reserve(chain) as reservation:
            wanted = np.flatnonzero(reservation.wanted)
            if len(wanted) == 0:
                return
            blocks = ContiguousBlocks(payload(chain))
            reservation.write(blocks, wanted)
            if self._random.random() < 0.2:
                time.sleep(self._random.random() * 0.2)
            reservation.commit().wait(60.0)

    def give_up_a_write(self) -> None:
        chain = self._some(10)
        with self._store.reserve(chain) as reservation:
            wanted = np.flatnonzero(reservation.wanted)
            garbage = np.full((len(chain), SPEC.block_bytes), 0xEE, np.uint8)
            if len(wanted):
                reservation.write(ContiguousBlocks(garbage), wanted)

    def pin(self) -> None:
        chain = self._some(4)
        self._store.pin(chain)
        self._store.unpin(chain)

    def wait_for(self) -> None:
        self._store.wait_for(self._some(), timeout=WAIT_S)

    def remove(self) -> None:
        chain = self._some()
        self._store.remove(chain[-1:])

    def prefetch(self) -> None:
        self._store.prefetch(self._some())

    def stats(self) -> None:
        self._store.stats()

    def connect_anew(self) -> None:
        self.leave()
        self._store = self._connect()

    def leave(self) -> None:
        for lease, _ in self._leases:
            lease.release()
        self._leases.clear()
        self._store.close(5.0)


def main() -> None:
    address, seed, token_file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    client = RandomClient(address, seed, token_file)
    while not select.select([sys.stdin], [], [], 0)[0]:
        try:
            client.one_call()
        except WrongBytes as error:
            say(wrong=str(error))
        except KVStoreError as error:
            say(wrong=f"{type(error).__name__}: {error}", where=traceback.format_exc()[-600:])
        except Exception:  # noqa: BLE001 whatever it is, it is a finding
            say(wrong=traceback.format_exc()[-1500:])
        if client.num_calls % BEAT_CALLS == 0:
            say(beat=client.num_calls)
    client.leave()
    say(done=client.num_calls)


if __name__ == "__main__":
    main()
