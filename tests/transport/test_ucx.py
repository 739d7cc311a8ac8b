"""What UCX adds to the contract of movers: readers that take no server with them when they die,
keys that are handed back, memory that is settled or said not to be, peers that die.

Two contexts of one process stand for two endpoints; what must not harm a process runs in one of its
own. One-sided moves, which are for RDMA, run over TCP here, where UCX emulates them. Peers are
killed and frozen. `test_ucx_libraries.py` runs this over every libucp there is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from kvstore import IncompatibleError, _native
from kvstore.errors import PeerUnavailableError
from kvstore.transport import (
    Batch,
    Endpoint,
    RegionInfo,
    Status,
    TransportSettings,
)
from kvstore.transport.ucx import UcxInfo
from tests.transport.peer import Peer, pattern
from tests.transport.ucx_support import ROOT, SECRET, library, run_python

SIZE = 1 << 20
TIMEOUT = 1.0
SLACK = 4.0  # for a loaded machine
ONLY_UCX = TransportSettings(movers=("ucx",), timeout=TIMEOUT)


def make(epoch: int = 7, one_sided: bool = False) -> _native.UcxContext:
    found = library()
    modules = found.allowed_modules
    return _native.UcxContext(
        found.path, "tcp", "lo", TIMEOUT, SECRET, epoch, modules=modules, one_sided=one_sided
    )


@pytest.fixture(params=[False, True], ids=["messages", "one_sided"])
def one_sided(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def ours(one_sided: bool) -> Iterator[_native.UcxContext]:
    made = make(one_sided=one_sided)
    yield made
    made.close()


@pytest.fixture
def theirs(one_sided: bool) -> Iterator[_native.UcxContext]:
    made = make(epoch=8, one_sided=one_sided)
    yield made
    made.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    library()
    made = Peer(ONLY_UCX)
    yield made
    made.close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    library()
    with Endpoint(ONLY_UCX) as made:
        yield made


def u64(*values: int) -> npt.NDArray[np.uint64]:
    return np.array(values, np.uint64)


def read(
    link: _native.UcxLink, region: int, here: npt.NDArray[np.uint8], offset: int = 0
) -> Status:
    """One piece that fills `here`."""
    (status,) = link.read(
        region, u64(offset), u64(here.ctypes.data), u64(here.nbytes), None, TIMEOUT
    )
    return Status(status)


# --- keys


def test_a_key_comes_back_before_the_region_is_gone(
    ours: _native.UcxContext, theirs: _native.UcxContext
) -> None:
    there, here = pattern(1, SIZE), np.zeros(SIZE, np.uint8)
    assert theirs.register(3, there.ctypes.data, SIZE, False)
    assert not theirs.register(3, there.ctypes.data, SIZE, False), "that id is taken"
    assert theirs.deregister(4, 0.0), "never registered"
    link = ours.connect(theirs.address(), 8, SECRET, TIMEOUT)
    assert read(link, 3, here) == Status.OK
    assert (here == there).all()
    assert theirs.deregister(3, TIMEOUT + SLACK), "an idle link hands keys back too"
    assert read(link, 3, here) == Status.REFUSED
    assert theirs.register(3, there.ctypes.data, SIZE, False), "it may come again"
    assert read(link, 3, here) == Status.OK
    assert link.is_alive()


def test_memory_that_is_gone_is_not_touched(one_sided: bool) -> None:
    """One-sided UCX over TCP reads whatever it is asked for: a server of which memory was unmapped
    would die, were it asked."""
    found = library()
    code = """
        import mmap, sys
        import numpy as np
        from kvstore import _native
        path, modules, mode = sys.argv[1:]
        def make(epoch):
            return _native.UcxContext(
                path, "tcp", "lo", 2.0, b"s" * 32, epoch, modules=modules, one_sided=bool(mode)
            )
        server, client = make(1), make(2)
        memory = mmap.mmap(-1, 1 << 20)
        address = np.frombuffer(memory, np.uint8).ctypes.data
        server.register(1, address, 1 << 20, False)
        link = client.connect(server.address(), 1, b"s" * 32, 5.0)
        here = np.ones(1 << 20, np.uint8)
        def read():
            where = np.array([here.ctypes.data], np.uint64)
            zero, size = np.zeros(1, np.uint64), np.full(1, 1 << 20, np.uint64)
            return int(link.read(1, zero, where, size, None, 5.0)[0])
        assert read() == 0 and not here.any()
        assert server.deregister(1, 5.0)
        memory.close()
        assert read() == 2
        print("alive", link.is_alive(), server.num_peers())
    """
    done = run_python(code, found.path, found.allowed_modules, "yes" if one_sided else "")
    assert (done.returncode, done.stdout) == (0, "alive True 1\n"), done.stderr


# A peer that obeys: "address" tells where it is; "read ADDRESS SIZE" reads a region, once.
PEER = """
    import sys
    import numpy as np
    from kvstore import _native
    path, modules, mode = sys.argv[1:]
    context = _native.UcxContext(
        path, "tcp", "lo", 1.0, bytes(range(32)), 9, modules=modules, one_sided=bool(mode)
    )
    memory = np.zeros(32 << 20, np.uint8)
    context.register(1, memory.ctypes.data, memory.nbytes, False)
    here, zero = np.zeros(32 << 20, np.uint8), np.zeros(1, np.uint64)
    for line in sys.stdin:
        do, *arguments = line.split()
        if do == "address":
            print(context.address().hex(), flush=True)
        else:
            link = context.connect(bytes.fromhex(arguments[0]), 7, bytes(range(32)), 10.0)
            where = np.array([here.ctypes.data], np.uint64)
            size = np.array([int(arguments[1])], np.uint64)
            print(link.read(1, zero, where, size, None, 10.0), flush=True)
"""


class Obedient:
    def __init__(self, one_sided: bool) -> None:
        found = library()
        arguments = [found.path, found.allowed_modules, "yes" if one_sided else ""]
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PEER), *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def obedient(one_sided: bool) -> Iterator[Obedient]:
    made = Obedient(one_sided)
    yield made
    made.end()


@pytest.mark.parametrize("one_sided", [True], indirect=True)
def test_memory_is_kept_while_a_frozen_peer_has_its_key(
    ours: _native.UcxContext, obedient: Obedient
) -> None:
    there = pattern(2, SIZE)
    ours.register(1, there.ctypes.data, SIZE, True)
    obedient.tell("read", ours.address().hex(), 64)
    assert obedient.says() == "[0]"
    obedient.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert not ours.deregister(1, 0.2)
    assert time.monotonic() - began < 0.2 + SLACK
    obedient.process.kill()
    assert ours.deregister(1, TIMEOUT + SLACK), "who is dead uses no key"


@pytest.mark.parametrize("one_sided", [False], indirect=True)
def test_a_frozen_peer_keeps_no_memory_that_it_asked_for(
    ours: _native.UcxContext, obedient: Obedient
) -> None:
    there = pattern(2, 32 << 20)
    ours.register(1, there.ctypes.data, there.nbytes, True)
    obedient.tell("read", ours.address().hex(), there.nbytes)
    give_up = time.monotonic() + SLACK
    while ours.num_peers() == 0 and time.monotonic() < give_up:
        pass
    obedient.process.send_signal(signal.SIGSTOP)
    assert ours.deregister(1, 1.0), "it is cut off"


# --- who may


@pytest.mark.parametrize("one_sided", [False], indirect=True)
def test_another_epoch_or_secret_is_refused(
    ours: _native.UcxContext, theirs: _native.UcxContext
) -> None:
    address = theirs.address()
    with pytest.raises(PermissionError, match="the peer's epoch is 8, not 12"):
        ours.connect(address, 12, SECRET, TIMEOUT)
    with pytest.raises(PermissionError, match="secret"):
        ours.connect(address, 8, b"another secret " * 3, TIMEOUT)
    with pytest.raises(ValueError, match="address"):
        ours.connect(b"", 8, SECRET, TIMEOUT)
    assert ours.connect(address, 0, SECRET, TIMEOUT).is_alive(), "0: any epoch"


def test_a_peer_of_the_mover_is_described_by_what_it_says(endpoint: Endpoint, peer: Peer) -> None:
    peer.register(SIZE)
    info = peer.info()
    link = endpoint.connect(info, movers=("ucx",))
    assert link.detail.startswith("UCX 1.")
    assert link.close()
    lying = type(info)(**{**{n: getattr(info, n) for n in info.__struct_fields__}, "epoch": 5})
    with pytest.raises(IncompatibleError, match="epoch"):
        endpoint.connect(lying, movers=("ucx",))


# --- ends


def test_a_killed_peer_is_noticed_by_an_idle_link(endpoint: Endpoint, peer: Peer) -> None:
    peer.register(SIZE)
    link = endpoint.connect(peer.info(), movers=("ucx",), timeout=10.0)
    peer.kill()
    give_up = time.monotonic() + SLACK
    while link.is_alive and time.monotonic() < give_up:
        pass
    assert not link.is_alive
    assert link.close()
    with pytest.raises(PeerUnavailableError):
        link._link.open(peer_region())


def peer_region() -> RegionInfo:

    return RegionInfo(1, 4096, 4096, False, {"ucx": b""})


def test_memory_is_settled_when_a_move_by_messages_ended(endpoint: Endpoint, peer: Peer) -> None:
    size = 16 << 20
    region = peer.register(size, seed=3)
    here, there = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    link = endpoint.connect(peer.info(), movers=("ucx",), timeout=10.0)
    peer.stop()
    began = time.monotonic()
    batch = Batch([here.ctypes.data], [0], size)
    (status,) = link.read(region.region_id, batch, timeout=0.3)
    assert time.monotonic() - began < 0.3 + SLACK
    assert status in (Status.LATE, Status.LOST)
    here[:] = 77
    peer.go_on()
    if not link.is_alive:
        link.close()
        link = endpoint.connect(peer.info(), movers=("ucx",), timeout=10.0)
    batch = Batch([there.ctypes.data], [0], size)
    assert link.read(region.region_id, batch, timeout=10.0).tolist() == [Status.OK]
    assert (there == pattern(3, size)).all()
    assert (here == 77).all(), "what came late went nowhere"
    assert link.close()


@pytest.mark.parametrize("one_sided", [True], indirect=True)
def test_memory_of_a_one_sided_move_is_settled_when_its_link_is_closed(
    ours: _native.UcxContext, obedient: Obedient
) -> None:
    obedient.tell("address")
    link = ours.connect(bytes.fromhex(obedient.says()), 9, SECRET, 10.0)
    here = np.ones(32 << 20, np.uint8)
    assert read(link, 1, here) == Status.OK
    obedient.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert read(link, 1, here) in (Status.LATE, Status.LOST)
    assert time.monotonic() - began < TIMEOUT + SLACK
    assert not link.is_alive(), "what was asked for may still come"
    assert link.failure()
    assert read(link, 1, here) == Status.LOST
    assert link.close(TIMEOUT + SLACK)


def test_a_reader_that_is_killed_in_the_middle_takes_nobody_with_it(
    endpoint: Endpoint, peer: Peer
) -> None:
    """UCX's own emulation of a get ends its target's process then."""
    region = peer.register(32 << 20, seed=5)
    assert region.region_id == 1
    info = peer.info()
    address = msgspec.msgpack.decode(info.movers["ucx"], type=UcxInfo).address
    code = """
        import sys
        import numpy as np
        from kvstore import _native
        path, modules, address, epoch, secret = sys.argv[1:]
        context = _native.UcxContext(path, "tcp", "lo", 1.0, b"s" * 32, 9, modules=modules)
        link = context.connect(bytes.fromhex(address), int(epoch), bytes.fromhex(secret), 10.0)
        here = np.zeros(32 << 20, np.uint8)
        where, zero = np.array([here.ctypes.data], np.uint64), np.zeros(1, np.uint64)
        print("reading", flush=True)
        while True:
            link.read(1, zero, where, np.array([here.nbytes], np.uint64), None, 10.0)
    """
    found = library()
    asked = [address.hex(), str(info.epoch), info.secret.hex()]
    arguments = [found.path, found.allowed_modules, *asked]
    for delay in (0.0, 0.01, 0.03):
        reader = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"reading\n"
        killer = threading.Timer(delay, reader.kill)
        killer.start()
        killer.join()
        reader.communicate()
    here = np.zeros(SIZE, np.uint8)
    link = endpoint.connect(info, movers=("ucx",), timeout=10.0)
    batch = Batch([here.ctypes.data], [0], SIZE)
    assert link.read(1, batch, timeout=10.0).tolist() == [Status.OK]
    assert link.close()


def test_silence_ends_a_move_before_its_own_deadline(endpoint: Endpoint, peer: Peer) -> None:
    region = peer.register(SIZE)
    here = np.zeros(SIZE, np.uint8)
    link = endpoint.connect(peer.info(), movers=("ucx",), timeout=10.0)
    peer.stop()
    began = time.monotonic()
    batch = Batch([here.ctypes.data], [0], SIZE)
    assert link.read(region.region_id, batch, timeout=60.0).tolist() == [Status.LOST]
    assert time.monotonic() - began < TIMEOUT + SLACK
    assert link.close()


def test_a_move_that_is_cancelled_in_time_keeps_its_link(endpoint: Endpoint, peer: Peer) -> None:
    size = 32 << 20
    region = peer.register(size, seed=4)
    here, there = np.zeros(size, np.uint8), pattern(4, size)
    offsets = np.arange(0, size, 1 << 16, dtype=np.uint64)
    batch = Batch(offsets + np.uint64(here.ctypes.data), offsets, 1 << 16)
    link = endpoint.connect(peer.info(), movers=("ucx",), timeout=10.0)
    cancel = _native.CancelFlag()
    cancel.set()
    statuses = link.read(region.region_id, batch, cancel=cancel)
    assert set(statuses.tolist()) <= {Status.OK, Status.CANCELLED}
    assert Status.CANCELLED in statuses
    assert link.is_alive, "nothing is under way any more"
    assert link.read(region.region_id, batch, timeout=20.0).max() == Status.OK
    assert (here == there).all()
    assert link.close()


def test_a_move_that_a_frozen_peer_holds_up_can_be_cancelled(
    endpoint: Endpoint, peer: Peer
) -> None:
    region = peer.register(SIZE)
    here = np.zeros(SIZE, np.uint8)
    link = endpoint.connect(peer.info(), movers=("ucx",), timeout=10.0)
    batch = Batch([here.ctypes.data], [0], SIZE)
    assert link.read(region.region_id, batch).tolist() == [Status.OK]
    peer.stop()
    cancel = _native.CancelFlag()
    timer = threading.Timer(0.05, cancel.set)
    timer.start()
    began = time.monotonic()
    statuses = link.read(region.region_id, batch, timeout=30.0, cancel=cancel)
    timer.join()
    assert statuses.tolist() == [Status.CANCELLED]
    assert time.monotonic() - began < SLACK
    assert link.close()


def test_threads_share_a_link(ours: _native.UcxContext, theirs: _native.UcxContext) -> None:
    size = 4 << 20
    there = pattern(5, size)
    theirs.register(1, there.ctypes.data, size, True)
    link = ours.connect(theirs.address(), 8, SECRET, TIMEOUT)
    wrong = []

    def move(number: int) -> None:
        here = np.zeros(size // 4, np.uint8)
        mine = there[number * here.nbytes :][: here.nbytes]
        sums = u64(*(_native.xxh3(mine[at : at + 65536]) for at in range(0, here.nbytes, 65536)))
        offsets = np.arange(0, here.nbytes, 65536, dtype=np.uint64)
        lengths = np.full(len(offsets), 65536, np.uint64)
        for turn in range(6):
            here[:] = 0
            remote = offsets + np.uint64(number * here.nbytes)
            local = offsets + np.uint64(here.ctypes.data)
            way = link.write if turn == 5 else link.read
            if turn == 5:
                here[:] = mine
            statuses = way(1, remote, local, lengths, sums, 20.0)
            if statuses.any() or (here != mine).any():
                wrong.append((number, turn, statuses))

    threads = [threading.Thread(target=move, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (there == pattern(5, size)).all()
    assert link.close(TIMEOUT)


def test_closing_a_context_ends_moves_under_way() -> None:
    library()
    frozen = Peer(ONLY_UCX)
    try:
        region = frozen.register(SIZE)
        endpoint = Endpoint(ONLY_UCX)
        link = endpoint.connect(frozen.info(), movers=("ucx",))
        frozen.stop()
        here = np.zeros(SIZE, np.uint8)
        batch = Batch([here.ctypes.data], [0], SIZE)
        move = link.submit_read(region.region_id, batch, timeout=30.0)
        began = time.monotonic()
        endpoint.close()
        assert move.wait(SLACK)[0] in (Status.LOST, Status.CANCELLED)
        assert time.monotonic() - began < SLACK
        link.close()
    finally:
        frozen.close()


@pytest.mark.parametrize("one_sided", [False], indirect=True)
def test_a_forked_child_is_told_and_does_no_harm(
    ours: _native.UcxContext, theirs: _native.UcxContext
) -> None:
    there, here = pattern(6, SIZE), np.zeros(SIZE, np.uint8)
    theirs.register(1, there.ctypes.data, SIZE, False)
    link = ours.connect(theirs.address(), 8, SECRET, TIMEOUT)
    pid = os.fork()
    if pid == 0:
        failures = 0
        for call in (ours.address, link.is_alive, ours.close, lambda: read(link, 1, here)):
            try:
                call()
            except RuntimeError as error:
                failures += "forked child" in str(error)
        os._exit(0 if failures == 4 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert read(link, 1, here) == Status.OK
    assert (here == there).all()
