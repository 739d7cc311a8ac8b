"""Our client and Mooncake's own, side by side: the same calls, the same answers.

A real `mooncake_master` with an embedded segment, and a kvstore that this process shares. Random
sequences of calls go to both; what they answer and what lies in memory afterwards must be equal.
Left out is what ours refuses on purpose, see test_answers.py, and what Mooncake leaves open: a key
twice in one batch. Values are removed by force, as Mooncake keeps what was just read.

Needs Mooncake importable beside kvstore.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("GLOG_minloglevel", "3")
mooncake = pytest.importorskip("mooncake.store")

from kvstore.bench.helpers import free_port  # noqa: E402
from kvstore_adapters.mooncake import ReplicateConfig  # noqa: E402
from tests.adapters.mooncake.support import OK, client, shared  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MEMORY_BYTES = 1 << 16
HALF = MEMORY_BYTES // 2
START_SECONDS = 60.0
KEYS = [f"key-{i}" for i in range(8)]


class Both:
    """Two clients, each with memory of its own, with the same bytes in it."""

    def __init__(self, theirs: Any, ours: Any) -> None:
        self.stores = (theirs, ours)
        bytes_of_memory = np.random.default_rng(1).integers(0, 256, MEMORY_BYTES, np.uint8)
        self.memories = (bytes_of_memory.copy(), bytes_of_memory.copy())

    def __call__(self, name: str, call: Callable[[Any, int], Any]) -> Any:
        """`call(store, address)` on both; what both answer."""
        answers = [
            call(store, memory.ctypes.data)
            for store, memory in zip(self.stores, self.memories, strict=True)
        ]
        assert answers[0] == answers[1], name
        assert np.array_equal(*self.memories), name
        return answers[0]


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    port, metrics = free_port(), free_port()
    programs = Path(mooncake.__file__).parent
    command = [str(programs / "mooncake_master"), "-rpc_address=127.0.0.1", f"-rpc_port={port}"]
    command += ["-metrics_host=127.0.0.1", f"-metrics_port={metrics}"]
    command += ["-enable_metric_reporting=false", "-default_kv_lease_ttl=30000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as master:
        store = mooncake.MooncakeDistributedStore()
        try:
            setup = ("127.0.0.1", "P2PHANDSHAKE", 256 << 20, 64 << 20, "tcp", "")
            give_up = time.monotonic() + START_SECONDS
            while store.setup(*setup, f"127.0.0.1:{port}") != OK:
                assert time.monotonic() < give_up, "mooncake_master does not answer"
            yield store
            store.close()
        finally:
            master.kill()


@pytest.fixture
def both(theirs: Any, tmp_path: Path) -> Iterator[Both]:
    with shared(tmp_path, cpu="64MiB") as address:
        ours = client(address)
        pair = Both(theirs, ours)
        theirs.remove_all(True)
        pair("register", lambda store, at: store.register_buffer(at, MEMORY_BYTES))
        yield pair
        pair("unregister", lambda store, at: store.unregister_buffer(at))
        ours.close()


@pytest.mark.parametrize("seed", range(8))
def test_random_calls_are_answered_alike(both: Both, seed: int) -> None:
    for number in range(150):
        name, call = random_call(random.Random(1000 * seed + number))
        both(name, call)


def random_call(dice: random.Random) -> tuple[str, Callable[[Any, int], Any]]:
    key, names = dice.choice(KEYS), dice.sample(KEYS, dice.randint(1, 4))
    size = dice.choice([1, 64, 100, 1000, 4096, 5000])
    value = dice.randbytes(size)
    from_, to = dice.randrange(HALF - 5000), HALF + dice.randrange(HALF - 5000)
    sizes = [dice.choice([1, 100, 3000]) for _ in names]
    sources = [dice.randrange(HALF - 3000) for _ in names]
    # Apart from each other, so that the order of copies does not matter.
    targets = [HALF + 8000 * i for i in range(len(names))]
    cut = [[size - size // 3, size // 3] if size > 2 else [size] for size in sizes]

    def pieces(at: int, begins: list[int]) -> list[list[int]]:
        return [
            [at + begin + 4000 * i for i in range(len(part))]
            for begin, part in zip(begins, cut, strict=True)
        ]

    calls: dict[str, Callable[[Any, int], Any]] = {
        "put": lambda store, at: store.put(key, value),
        "put_batch": lambda store, at: store.put_batch(names, [value] * len(names)),
        "put_parts": lambda store, at: store.put_parts(key, value, b"end"),
        "put_from": lambda store, at: store.put_from(key, at + from_, size),
        "batch_put_from": lambda store, at: store.batch_put_from(
            names, [at + source for source in sources], sizes
        ),
        "batch_put_from_multi_buffers": lambda store, at: store.batch_put_from_multi_buffers(
            names, pieces(at, [source // 2 for source in sources]), cut
        ),
        "get": lambda store, at: store.get(key),
        "get_batch": lambda store, at: store.get_batch(names),
        "get_buffer": lambda store, at: bytes(store.get_buffer(key) or b""),
        "get_into": lambda store, at: store.get_into(key, at + to, 5000),
        "get_into, too short": lambda store, at: store.get_into(key, at + to, 70),
        "batch_get_into": lambda store, at: store.batch_get_into(
            names, [at + target for target in targets], [5000] * len(names)
        ),
        "is_exist": lambda store, at: store.is_exist(key),
        "batch_is_exist": lambda store, at: store.batch_is_exist(KEYS),
        "get_size": lambda store, at: store.get_size(key),
        "remove": lambda store, at: store.remove(key, True),
        "batch_remove": lambda store, at: store.batch_remove(names, True),
        "replicas": lambda store, at: {
            name: [replica.is_memory_replica() for replica in found]
            for name, found in store.batch_get_replica_desc(names).items()
        },
    }
    name = dice.choice(list(calls))
    return name, calls[name]


CASES: dict[str, Callable[[Any, int], Any]] = {
    "empty value": lambda store, at: store.put("new", b""),
    "empty key": lambda store, at: (store.put("", b"1"), store.get(""), store.is_exist("")),
    "one empty value": lambda store, at: store.put_batch(["n1", "n2"], [b"1", b""]),
    "keys without values": lambda store, at: store.put_batch(["n1", "n2"], [b"1"]),
    "no keys": lambda store, at: (store.put_batch([], []), store.batch_put_from([], [], [])),
    "no parts": lambda store, at: (store.put_parts("n3"), store.is_exist("n3")),
    "a part of a batch": lambda store, at: store.batch_put_from(["n4", "n5"], [at, at], [10, 0]),
    "a second put": lambda store, at: (store.put("old", b"second"), store.get("old")),
    "missing": lambda store, at: (store.get("no"), store.is_exist("no"), store.get_size("no")),
    "missing into": lambda store, at: store.get_into("no", at, 10),
    "too short": lambda store, at: store.get_into("old", at + HALF, 3),
    "longer": lambda store, at: store.get_into("old", at + HALF, 300),
    "lengths": lambda store, at: store.batch_get_into(["old", "no"], [at], [100]),
    "pieces, too short": lambda store, at: store.batch_get_into_multi_buffers(
        ["old"], [[at + HALF]], [[4]]
    ),
    "pieces, cut otherwise": lambda store, at: store.batch_get_into_multi_buffers(
        ["old"], [[at + HALF, at + HALF + 10]], [[1, 4]]
    ),
    "pieces, too long": lambda store, at: (
        store.batch_get_into_multi_buffers(
            ["long"], [[at + HALF + 20, at + HALF + 200]], [[100, 50]]
        )[0]
        < 0
    ),
    "pieces without sizes": lambda store, at: store.batch_put_from_multi_buffers(
        ["n6"], [[at, at]], [[10]]
    ),
    "no pieces": lambda store, at: store.batch_put_from_multi_buffers(["n7"], [[]], [[]]),
    "an empty piece": lambda store, at: (
        store.batch_put_from_multi_buffers(["n8"], [[at, at]], [[10, 0]]),
        store.get_size("n8"),
    ),
    "ranges without a session": lambda store, at: store.batch_get_into_multi_buffer_ranges(
        ["long"], [[at + HALF]], [[10]], [[5]]
    ),
    "a session": lambda store, at: (
        store.batch_get_session_start(["long", "no"]),
        store.batch_get_into_multi_buffer_ranges(
            ["long"], [[at + HALF, at + HALF + 50]], [[10, 5]], [[5, 40]]
        ),
        store.batch_get_into_multi_buffer_ranges(["long"], [[at + HALF]], [[10]], [[95]]),
        store.batch_get_into_multi_buffer_ranges(["no"], [[at + HALF]], [[10]], [[5]]),
        store.batch_get_into_multi_buffer_ranges(["long"], [[at + HALF]], [[10]], [[5, 6]]),
        store.batch_get_session_end(["long", "no"]),
        store.batch_get_session_end(["long"]),
    ),
    "registered twice": lambda store, at: store.register_buffer(at, MEMORY_BYTES),
    "registered in part": lambda store, at: store.register_buffer(at + 100, 50),
    "nothing registered": lambda store, at: (
        store.register_buffer(at, 0),
        store.register_buffer(0, 10),
        store.unregister_buffer(at + 1),
        store.unregister_buffer(0),
    ),
    "removed": lambda store, at: (
        store.remove("old", True),
        store.remove("old", True),
        store.batch_remove(["long", "no"], True),
        store.batch_remove([]),
        store.put("old", b"third"),
        store.get("old"),
    ),
    "too large": lambda store, at: put_large(store),
    "healthy": lambda store, at: store.health_check(),
    "set up again": lambda store, at: store.remove_all(True) >= 0,
}


def put_large(store: Any) -> Any:
    memory = np.zeros(300 << 20, np.uint8)  # more than either has
    return (
        store.register_buffer(memory.ctypes.data, memory.nbytes),
        store.put_from("large", memory.ctypes.data, memory.nbytes),
        store.unregister_buffer(memory.ctypes.data),
    )


@pytest.mark.parametrize("name", CASES)
def test_cases_are_answered_alike(both: Both, name: str) -> None:
    both("old", lambda store, at: store.put("old", b"first"))
    both("long", lambda store, at: store.put("long", bytes(range(100))))
    both(name, CASES[name])


def test_configurations_have_the_same_fields() -> None:
    theirs, ours = mooncake.ReplicateConfig(), ReplicateConfig()
    names = [name for name in dir(theirs) if not name.startswith("_")]
    assert [name for name in names if not hasattr(ours, name)] == []
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name) or "action" in name or "type" in name
