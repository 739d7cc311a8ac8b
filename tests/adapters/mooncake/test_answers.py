"""What each method answers, case by case, as Mooncake's own client does.

`test_like_mooncake.py` runs both clients side by side where Mooncake is installed. Here are the
cases of which its answers were noted, and those in which ours differs on purpose: memory that is
not registered, and use before setup or after close, which Mooncake does not survive.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvstore
from kvstore.bench.serving import PrivateDaemon
from kvstore_adapters.mooncake import MooncakeDistributedStore, ReplicateConfig, shim
from kvstore_adapters.mooncake.memory import MooncakeHostMemAllocator
from tests.adapters.mooncake.support import (
    AWAY,
    INVALID,
    NO_ROOM,
    NOT_FOUND,
    OK,
    WRONG_SIZE,
    Memory,
    client,
    shared,
)
from tests.daemon.daemon_support import RawClient, wait_until

MEMORY_BYTES = 1 << 16


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with shared(tmp_path_factory.mktemp("shared")) as found:
        yield found


@pytest.fixture
def store(address: str) -> Iterator[MooncakeDistributedStore]:
    made = client(address, local_hostname="here")
    assert made.remove_all() == OK
    yield made
    made.close()


@pytest.fixture
def memory(store: MooncakeDistributedStore) -> Memory:
    return Memory(MEMORY_BYTES, store)


def test_a_value_comes_back(store: MooncakeDistributedStore) -> None:
    assert store.put("key", b"value") == OK
    assert store.get("key") == b"value"
    assert (store.is_exist("key"), store.get_size("key")) == (1, 5)
    assert store.batch_is_exist(["key", "other"]) == [1, 0]


def test_what_is_not_there(store: MooncakeDistributedStore, memory: Memory) -> None:
    assert store.get("key") == b""
    assert store.get_batch(["key"]) == [b""]
    assert store.get_buffer("key") is None
    assert (store.is_exist("key"), store.get_size("key")) == (0, NOT_FOUND)
    assert store.get_into("key", memory.at(0), 10) == NOT_FOUND
    assert (store.remove("key"), store.batch_remove(["key"])) == (NOT_FOUND, [NOT_FOUND])
    assert store.batch_get_replica_desc(["key"]) == {}


def test_a_second_put_keeps_the_first_value(store: MooncakeDistributedStore) -> None:
    assert [store.put("key", b"first"), store.put("key", b"the second")] == [OK, OK]
    assert store.get("key") == b"first"
    assert store.put_batch(["twice", "twice"], [b"1", b"22"]) == OK
    assert store.get("twice") == b"1"


def test_a_removed_key_takes_a_new_value(store: MooncakeDistributedStore) -> None:
    store.put("key", b"first")
    assert (store.remove("key"), store.remove("key")) == (OK, NOT_FOUND)
    assert store.put("key", b"other") == OK
    assert store.get("key") == b"other"


def test_nothing_is_no_value(store: MooncakeDistributedStore, memory: Memory) -> None:
    assert store.put("key", b"") == INVALID
    assert store.put_batch(["a", "b"], [b"1", b""]) == INVALID
    assert store.batch_put_from(["c", "d"], [memory.at(0)] * 2, [10, 0]) == [OK, INVALID]
    assert store.batch_put_from_multi_buffers(["e"], [[]], [[]]) == [INVALID]
    assert store.put("", b"x") == INVALID
    assert store.put_parts("f") == OK
    assert store.batch_is_exist([*"abcdef", "key", ""]) == [0, 0, 1, 0, 0, 0, 0, 0]


def test_lists_of_different_lengths(store: MooncakeDistributedStore, memory: Memory) -> None:
    at = memory.at(0)
    assert store.put_batch(["a", "b"], [b"1"]) == INVALID
    assert store.batch_put_from(["a", "b"], [at], [10]) == [INVALID] * 2
    assert store.batch_get_into(["a", "b"], [at], [10]) == [INVALID] * 2
    assert store.batch_put_from_multi_buffers(["a"], [[at, at]], [[10]]) == [INVALID]
    assert store.batch_get_into_multi_buffers(["a"], [[at, at]], [[10]]) == [INVALID]
    assert store.batch_get_into_multi_buffer_ranges(["a"], [[at]], [[10]], []) == [INVALID]
    assert (store.batch_put_from([], [], []), store.batch_get_into([], [], [])) == ([], [])
    assert (store.batch_is_exist([]), store.put_batch([], [])) == ([], OK)
    assert (store.batch_remove([]), store.get_batch([])) == ([], [])


@pytest.mark.parametrize(
    "make", [bytes, bytearray, memoryview, lambda value: np.frombuffer(value, "<u2")]
)
def test_values_are_whatever_has_bytes(
    store: MooncakeDistributedStore, make: Callable[[bytes], Any]
) -> None:
    assert store.put("key", make(b"12345678")) == OK
    assert store.get("key") == b"12345678"


def test_values_of_strided_arrays_and_parts(store: MooncakeDistributedStore) -> None:
    assert store.put("key", np.arange(6, dtype=np.uint8)[::2]) == OK
    assert store.get("key") == bytes([0, 2, 4])
    assert store.put_parts("parts", b"ab", bytearray(b"c"), b"") == OK
    assert store.get("parts") == b"abc"
    with pytest.raises(TypeError):
        store.put("text", "no bytes")


def test_buffers_of_values(store: MooncakeDistributedStore) -> None:
    store.put("key", b"value")
    found, missing = store.batch_get_buffer(["key", "other"])
    assert missing is None
    assert found is not None
    assert bytes(memoryview(found)) == b"value"
    assert (found.size(), found.ptr() != 0) == (5, True)


def test_put_and_get_at_addresses(store: MooncakeDistributedStore, memory: Memory) -> None:
    at = memory.at
    assert store.put_from("one", at(0), 100, ReplicateConfig()) == OK
    assert store.batch_put_from(["two", "one"], [at(100), at(0)], [50, 10]) == [OK, OK]
    wanted = [memory[:100], memory[100:150]]
    got = store.batch_get_into(["one", "none", "two"], [at(1000), at(0), at(2000)], [100, 1, 50])
    assert got == [100, NOT_FOUND, 50]
    assert [memory[1000:1100], memory[2000:2050]] == wanted


def test_a_buffer_may_be_longer_than_its_value_and_not_shorter(
    store: MooncakeDistributedStore, memory: Memory
) -> None:
    store.put("key", b"x" * 100)
    after = memory[1100:1300]
    assert store.get_into("key", memory.at(1000), 300) == 100
    assert (memory[1000:1100], memory[1100:1300]) == (b"x" * 100, after)
    assert store.get_into("key", memory.at(1000), 99) == INVALID
    assert store.get_into("key", memory.at(1000), 0) == INVALID


def test_values_in_pieces(store: MooncakeDistributedStore, memory: Memory) -> None:
    at = memory.at
    pieces = [[at(0), at(500), at(20)], [at(100)]]
    sizes = [[10, 20, 0], [70]]
    assert store.batch_put_from_multi_buffers(["a", "b"], pieces, sizes) == [OK, OK]
    value = memory[:10] + memory[500:520]
    assert (store.get("a"), store.get("b")) == (value, memory[100:170])
    other_cut = [[at(1000), at(2000), at(3000)]]
    assert store.batch_get_into_multi_buffers(["a"], other_cut, [[1, 25, 4]]) == [30]
    assert memory[1000:1001] + memory[2000:2025] + memory[3000:3004] == value
    assert store.batch_get_into_multi_buffers(["a"], [[at(0)]], [[20]]) == [INVALID]
    assert store.batch_get_into_multi_buffers(["a"], [[at(0)]], [[40]]) == [WRONG_SIZE]
    # Two values to the same place: one of them is there afterwards, as a whole.
    store.put("c", b"c" * 70)
    assert store.batch_get_into(["b", "c"], [at(4000)] * 2, [70] * 2) == [70, 70]
    assert memory[4000:4070] in (store.get("b"), b"c" * 70)


def test_memory_that_is_not_registered_is_left_alone(
    store: MooncakeDistributedStore, memory: Memory
) -> None:
    store.put("key", b"x" * 10)
    other = Memory(100)
    for at in (0, -1, 8, other.at(0), memory.at(MEMORY_BYTES - 5), (1 << 64) - 5, 1 << 64):
        assert store.put_from("new", at, 10) == INVALID
        assert store.get_into("key", at, 10) == INVALID
        assert store.batch_put_from(["a", "b"], [at, memory.at(0)], [10, 10]) == [INVALID, OK]
        pieces = [[memory.at(0), at]]
        assert store.batch_get_into_multi_buffers(["key"], pieces, [[4, 6]]) == [INVALID]
        store.remove("b")
    assert store.put_from("new", memory.at(0), -1) == INVALID
    assert store.is_exist("new") == 0


def test_without_registration_where_that_is_asked_for(address: str) -> None:
    store = client(address, require_registration="false")
    memory = Memory(100)
    assert store.put_from("free", memory.at(0), 100) == OK
    assert store.get("free") == memory[:]
    assert store.put_from("null", 0, 100) == INVALID
    store.close()


def test_registering(store: MooncakeDistributedStore) -> None:
    memory = Memory(3000)
    at = memory.at
    assert store.register_buffer(at(1000), 1000) == OK
    for begin, size in ((1000, 1000), (0, 1001), (1999, 1), (1200, 10), (0, 3000)):
        assert store.register_buffer(at(begin), size) == INVALID
    assert [store.register_buffer(at(0), 1000), store.register_buffer(at(2000), 1)] == [OK, OK]
    assert [store.register_buffer(0, 10), store.register_buffer(at(2500), 0)] == [INVALID] * 2
    assert store.put_from("over the edge", at(990), 20) == INVALID
    assert [store.unregister_buffer(at(1000)), store.unregister_buffer(at(1000))] == [OK, INVALID]
    assert store.unregister_buffer(at(5)) == INVALID
    assert store.put_from("gone", at(1000), 10) == INVALID


def test_memory_that_would_end_the_process_is_not_registered(
    store: MooncakeDistributedStore,
) -> None:
    """A GPU's, for one: its addresses are reserved, and cannot be read."""
    page = mmap.PAGESIZE
    with mmap.mmap(-1, 4 * page, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        at = int(view.ctypes.data)
        protect = ctypes.CDLL(None).mprotect
        protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        assert protect(at + page, page, 0) == 0
        assert protect(at + 3 * page, page, mmap.PROT_READ) == 0
        for begin, count in ((0, 2), (1, 1), (1, 2), (2, 2), (3, 1)):
            assert store.register_buffer(at + begin * page, count * page) == INVALID
        assert store.register_buffer(at + 2 * page, page) == OK
        assert store.put_from("key", at + 2 * page, page) == OK
        assert store.put_from("key", at + page, page) == INVALID
        assert protect(at, 4 * page, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        del view
    assert store.register_buffer(1 << 46, page) == INVALID


def test_sessions(store: MooncakeDistributedStore, memory: Memory) -> None:
    at = memory.at
    store.put("key", bytes(range(100)))

    def ranges(offsets: list[int], sizes: list[int]) -> int:
        places = [at(1000 + 100 * i) for i in range(len(sizes))]
        return store.batch_get_into_multi_buffer_ranges(["key"], [places], [sizes], [offsets])[0]

    assert ranges([0], [10]) == INVALID
    assert store.batch_get_session_start(["key", "none"]) == [OK, NOT_FOUND]
    assert store.batch_get_session_start(["key"]) == [OK]
    assert ranges([5, 90], [20, 10]) == 30
    assert memory[1000:1020] + memory[1100:1110] == bytes([*range(5, 25), *range(90, 100)])
    assert [ranges([91], [10]), ranges([-1], [10]), ranges([1, 2], [10])] == [INVALID] * 3
    assert (store.batch_get_session_end(["key", "none"]), ranges([0], [100])) == (OK, 100)
    assert (store.batch_get_session_end(["key"]), ranges([0], [100])) == (OK, INVALID)


def test_where_a_value_lies(store: MooncakeDistributedStore) -> None:
    store.put("key", b"value")
    (replica,) = store.batch_get_replica_desc(["key", "other"])["key"]
    assert (replica.is_memory_replica(), replica.is_disk_replica()) == (True, False)
    assert len(store.get_replica_desc("key")) == 1


def test_removing_all(store: MooncakeDistributedStore, address: str) -> None:
    """Also what another client put, in slots of a size that this one never used."""
    other = client(address)
    other.put("large", b"x" * 5000)
    store.put("small", b"x")
    assert store.remove_all(True) == OK
    assert other.batch_is_exist(["large", "small"]) == [0, 0]
    other.close()


def test_tenants_do_not_meet(store: MooncakeDistributedStore, address: str) -> None:
    other = client(address, tenant_id="other")
    store.put("key", b"ours")
    assert other.is_exist("key") == 0
    other.put("key", b"theirs")
    other.remove_all()
    assert store.get("key") == b"ours"
    other.close()


def test_what_kvstore_does_not_know(store: MooncakeDistributedStore) -> None:
    store.put("key", b"value")
    assert store.remove_by_regex(".*") < 0
    assert store.is_exist("key") == 1


def test_about_itself(store: MooncakeDistributedStore, address: str) -> None:
    assert (store.get_hostname(), store.health_check()) == ("here", 0)
    assert store.setup("elsewhere", "P2PHANDSHAKE", 0, 0, "tcp", "", address) == OK  # it is set up
    assert store.get_hostname() == "here"
    dummy = MooncakeDistributedStore()
    assert dummy.setup_dummy(1 << 20, 1 << 20, address) == OK
    assert dummy.health_check() == 0
    assert (dummy.close(), dummy.close(), dummy.health_check()) == (OK, OK, 1)


def test_a_value_that_no_chunk_holds_has_no_room(store: MooncakeDistributedStore) -> None:
    """Not as an error of the caller's: vLLM gives a client up that answers it to a put."""
    assert store.put("key", bytes(2 << 20)) == NO_ROOM
    assert store.is_exist("key") == 0


def test_a_value_of_any_size_costs_the_others_of_its_batch_nothing(address: str) -> None:
    store = client(address, require_registration=False)
    memory = np.arange(64, dtype=np.uint8)
    at = memory.ctypes.data
    answers = store.batch_put_from(["huge", "small"], [at, at], [1 << 46, 64])
    assert answers == [NO_ROOM, OK]
    assert store.get("small") == memory.tobytes()
    store.close()


def test_setup_fails_where_no_daemon_is(tmp_path: Path, address: str) -> None:
    store = MooncakeDistributedStore()
    assert store.setup("", "", 0, 0, "tcp", "", f"unix:{tmp_path}/none") == AWAY
    assert store.setup({"master_server_address": "nonsense"}) == INVALID
    assert store.setup({}) == INVALID
    assert store.setup({"master_server_address": address}) == OK
    store.close()


CALLS: list[Callable[[MooncakeDistributedStore, int], Any]] = [
    lambda store, at: store.put("a", b"x"),
    lambda store, at: store.put_batch(["a"], [b"x"]),
    lambda store, at: store.put_parts("a", b"x"),
    lambda store, at: store.put_from("a", at, 10),
    lambda store, at: store.batch_put_from(["a"], [at], [10]),
    lambda store, at: store.batch_put_from_multi_buffers(["a"], [[at]], [[10]]),
    lambda store, at: store.get_into("a", at, 10),
    lambda store, at: store.batch_get_into(["a"], [at], [10]),
    lambda store, at: store.batch_get_into_multi_buffers(["a"], [[at]], [[10]]),
    lambda store, at: store.batch_get_into_multi_buffer_ranges(["a"], [[at]], [[10]], [[0]]),
    lambda store, at: store.batch_get_session_start(["a"]),
    lambda store, at: store.is_exist("a"),
    lambda store, at: store.batch_is_exist(["a"]),
    lambda store, at: store.get_size("a"),
    lambda store, at: store.remove("a"),
    lambda store, at: store.batch_remove(["a"]),
    lambda store, at: store.remove_all(),
    lambda store, at: store.register_buffer(at, 10),
    lambda store, at: store.unregister_buffer(at),
]


@pytest.mark.parametrize("state", ["before setup", "after close"])
def test_no_call_crashes_without_a_connection(address: str, state: str) -> None:
    store = MooncakeDistributedStore()
    memory = Memory(100)
    if state == "after close":
        store.setup({"master_server_addr": address})
        store.register_buffer(memory.at(0), 100)
        store.put("a", b"x")
        store.close()
    for call in CALLS:
        assert call(store, memory.at(0)) in (INVALID, [INVALID])
    assert (store.get("a"), store.get_batch(["a"]), store.get_buffer("a")) == (b"", [b""], None)
    assert (store.batch_get_replica_desc(["a"]), store.get_hostname()) == ({}, "")
    assert (store.health_check(), store.batch_get_session_end(["a"])) == (1, OK)


def states(pid: int) -> list[str]:
    """Of a process's threads, as in ps."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found.append(task.read_text().rpartition(") ")[2][0])
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_without_the_daemon_nothing_is_there_and_nothing_is_stored(
    tmp_path: Path, how: signal.Signals
) -> None:
    with PrivateDaemon(tmp_path, cpu="4MiB") as daemon:
        daemon.start()
        store = client(daemon.address, timeout="0.1")
        memory = Memory(1000, store)
        assert store.put("old", b"value") == OK
        os.kill(daemon.pid, how)
        wait_until(lambda: set(states(daemon.pid)) <= {"T", "Z"})  # all threads, not only one
        try:
            assert store.put("new", b"value") == AWAY
            assert store.batch_put_from(["new"], [memory.at(0)], [500]) == [AWAY]
            assert (store.get("old"), store.is_exist("old")) == (b"", 0)
            assert store.get_into("old", memory.at(0), 100) == NOT_FOUND
            assert (store.remove("old"), store.remove_all()) == (AWAY, AWAY)
            assert store.health_check() == 2
        finally:
            if how == signal.SIGSTOP:
                os.kill(daemon.pid, signal.SIGCONT)
        assert store.close() == OK


def test_a_full_store_says_so(tmp_path: Path) -> None:
    with shared(tmp_path, cpu="1MiB", chunk="256KiB") as address:
        store = client(address)
        size = 100_000
        codes = [store.put(f"{i}", bytes(size)) for i in range(20)]
        kept = store.batch_is_exist([f"{i}" for i in range(20)])
        # All may be evicted, so there is room for each; what is gone is gone as a whole.
        assert set(codes) <= {OK, NO_ROOM}
        assert 0 < sum(kept) < 20
        for i, is_there in enumerate(kept):
            assert store.get(f"{i}") == (bytes(size) if is_there else b"")
        store.close()


def test_a_damaged_value_is_not_there(tmp_path: Path) -> None:
    with shared(tmp_path, verify="always") as address:
        store = client(address)
        store.put("key", b"x" * 5000)
        assert store._objects is not None
        values = store._objects._store(5120)
        with values.acquire([store._objects.find(["key"])["name"][0].tobytes()]) as lease:
            assert lease.block(0)[:5000].tobytes() == b"x" * 5000
            with RawClient(address, values.namespace) as raw:
                raw.memory[int(lease._granted.offsets[0]) + 7] ^= 1
        assert store.get("key") == b""
        assert store.is_exist("key") == 0
        assert store.put("key", b"y" * 5000) == OK
        assert store.get("key") == b"y" * 5000
        store.close()


def test_host_memory() -> None:
    allocator = MooncakeHostMemAllocator()
    at = allocator.alloc(10_000)
    assert at % 4096 == 0
    assert at != 0
    assert (allocator.free(at), allocator.free(at), allocator.alloc(0)) == (0, -1, 0)


def test_engines_find_it_by_mooncakes_name() -> None:
    """In a new process, as engines start theirs: PYTHONPATH is all that is set."""
    root = Path(kvstore.__file__).parents[1]
    path = os.pathsep.join([shim.PATH, str(root), str(root / "adapters")])
    names = "MooncakeDistributedStore, ReplicateConfig, MooncakeHostMemAllocator"
    code = f"from mooncake.store import {names}; print(MooncakeDistributedStore.__module__)"
    environment = {**os.environ, "PYTHONPATH": path}
    found = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert found.strip() == "kvstore_adapters.mooncake.store"
    command = [sys.executable, "-m", "kvstore_adapters.mooncake.shim"]
    printed = subprocess.check_output(command, env=environment, text=True)
    assert printed.strip() == shim.PATH
