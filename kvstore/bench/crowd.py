"""Eight clients of one daemon at once, each a process that loads batches of 1 MiB blocks.

`python -m kvstore.bench.crowd ADDRESS NAMESPACE BYTES` is one of them: for each line with a number
of seconds on its standard input it loads for so long, and prints how many bytes it got.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import TracebackType

import numpy as np

import kvstore
from kvstore.bench.dram import MIB, SPEC_1MIB, touched_memory
from kvstore.bench.report import Figure
from kvstore.bench.timing import Scale
from kvstore.block import BlockHashes, Namespace
from kvstore.errors import KVStoreError

CLIENTS = 8
BATCH = 16
CHAINS = 16  # of BATCH blocks: 256 MiB, larger than caches
TARGET_BYTES = 64 * MIB  # of each client
TIMEOUT_SECONDS = 30.0
_CODE = "import sys; sys.path[:] = {path!r}; from kvstore.bench.crowd import main; main()"


def _chains(seed: int, count: int) -> list[BlockHashes]:
    random = np.random.default_rng(seed)
    return [BlockHashes.chain(random.integers(0, 256, (BATCH, 32), np.uint8)) for _ in range(count)]


class _Client:
    def __init__(self, address: str, model: str, seed: int, chains: int) -> None:
        arguments = [address, model, str(seed), str(chains)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CODE.format(path=sys.path), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, seconds: float) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()

    def answer(self) -> float:
        """Bytes per second of the last request; of the first line, 0."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise KVStoreError("a client of the crowd ended")
        return float(json.loads(line))

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class _Crowd:
    def __init__(self, address: str, model: str, seed: int, chains: int) -> None:
        self.clients = [_Client(address, model, seed, chains) for _ in range(CLIENTS)]
        for client in self.clients:
            client.answer()

    def run(self, count: int, seconds: float) -> list[float]:
        """Bytes per second of each of the first `count` clients, all at work at the same time."""
        for client in self.clients[:count]:
            client.ask(seconds)
        return [client.answer() for client in self.clients[:count]]

    def __enter__(self) -> _Crowd:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for client in self.clients:
            client.close()


def figures(scale: Scale, address: str) -> list[Figure]:
    """Throughput of eight clients over that of one, and of the slowest over the fastest."""
    seed = int(np.random.default_rng().integers(1 << 62))
    model, chains = f"bench-crowd-{seed:x}", scale.pick(CHAINS, 2)
    rounds, seconds = scale.pick(7, 2), scale.pick(20, 3) / 10
    ones, totals, fairness = [], [], []
    namespace = Namespace(model, SPEC_1MIB)
    with kvstore.connect(address, namespace, timeout=TIMEOUT_SECONDS) as store:
        _fill(store, _chains(seed, chains))
        try:
            with _Crowd(address, model, seed, chains) as crowd:
                for number in range(rounds):
                    for count in (1, CLIENTS) if number % 2 == 0 else (CLIENTS, 1):
                        rates = crowd.run(count, seconds)
                        if count == 1:
                            ones.append(rates[0])
                        else:
                            totals.append(sum(rates))
                            fairness.append(min(rates) / max(rates))
        finally:
            store.clear()
    ratio = float(np.median(np.array(totals) / np.array(ones)))
    total = float(np.median(totals)) / 1e9
    return [
        Figure("clients_8_total", total, "GB/s", ratio, "one client"),
        Figure("clients_8_fairness", float(np.median(fairness)), "slowest / fastest client"),
    ]


def _fill(store: kvstore.Store, chains: list[BlockHashes]) -> None:
    rows = touched_memory(BATCH * MIB).reshape(BATCH, MIB)
    for number, chain in enumerate(chains):
        rows[:] = number + 1
        done = store.put(chain, kvstore.ContiguousBlocks(rows)).wait()
        assert done.num_stored == BATCH


def main() -> None:
    address, model, seed, count = sys.argv[1:]
    chains = _chains(int(seed), int(count))
    rows = touched_memory(TARGET_BYTES).reshape(-1, MIB)
    blocks = kvstore.ContiguousBlocks(rows)
    ids = np.arange(len(rows), dtype=np.int64).reshape(-1, BATCH)
    with kvstore.connect(address, Namespace(model, SPEC_1MIB), timeout=TIMEOUT_SECONDS) as store:
        step = int(np.random.default_rng().integers(len(chains)))  # not all the same at once
        print(0.0, flush=True)  # noqa: T201 - ready
        for line in sys.stdin:
            begin, moved = time.perf_counter(), 0
            end = begin + float(line)
            while (now := time.perf_counter()) < end:
                step += 1
                chain, into = step % len(chains), ids[step % len(ids)]
                done = store.load(chains[chain], blocks, into).wait()
                assert done.num_blocks == BATCH
                assert rows[into[-1], -1] == chain + 1
                moved += BATCH * MIB
            print(moved / (now - begin), flush=True)  # noqa: T201
