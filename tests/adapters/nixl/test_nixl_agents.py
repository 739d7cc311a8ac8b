"""Memory of ours is read by the NIXL agent of an engine, and an engine's by ours, byte for byte;
what fails says so in its status, and in time. The engine is a process of its own that has NIXL and
nothing of kvstore (`engine.py`); it is killed and stopped in the middle of things. Moves go over
UCX's tcp and over what UCX likes best on one host."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvstore
from kvstore import ConfigError, IncompatibleError, StoreClosedError
from kvstore.transport import Batch, SharedMemory, Status, checksums_of
from kvstore_adapters.nixl import AgentInfo, MemoryRange, NixlAgent, NixlLink, ranges_of_blocks
from tests.adapters.nixl import engine as engine_process
from tests.adapters.nixl.engine import BLOCK_BYTES, BLOCKS, LAYERS, layers

try:
    engine_process.find_nixl()
except ImportError:
    pytest.skip("needs NIXL: pip install --no-deps nixl-cu12", allow_module_level=True)

WAIT_S = 60.0
TIMEOUT = 20.0


class Engine:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, engine_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        said = self._line()
        self.name: str = said["name"]
        self.metadata: bytes = base64.b64decode(said["metadata"])
        self.base_addresses: list[int] = said["base_addresses"]

    @property
    def info(self) -> AgentInfo:
        """As an engine's own handshake gives it: metadata, and a base address a layer."""
        ranges = ranges_of_blocks(self.base_addresses, BLOCKS, BLOCK_BYTES)
        return AgentInfo(self.name, self.metadata, ranges)

    def ask(self, **asked: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return self._line()

    def read(self, agent: NixlAgent, pieces: list[tuple[int, int]], notice: str = "") -> Any:
        metadata = base64.b64encode(agent.info().metadata).decode()
        return self.ask(read={"metadata": metadata, "pieces": pieces, "notice": notice})

    def _line(self) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], WAIT_S)
        assert ready, "the engine does not answer"
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@pytest.fixture(params=["tcp", ""], ids=["tcp", "any"])
def tls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    # Without RDMA nothing makes this process crash at its exit, see `ends_badly`.
    monkeypatch.setenv("UCX_MODULES", "^ib")
    if request.param:
        monkeypatch.setenv("UCX_TLS", request.param)
        monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    return str(request.param)


@pytest.fixture
def engine(tls: str) -> Iterator[Engine]:
    made = Engine()
    yield made
    made.close()


@pytest.fixture
def agent(tls: str) -> Iterator[NixlAgent]:
    with NixlAgent(devices="lo" if tls else "") as made:
        yield made


@pytest.fixture
def memory(agent: NixlAgent) -> SharedMemory:
    made = SharedMemory(BLOCKS * BLOCK_BYTES)
    made.array[:] = np.random.default_rng(99).integers(0, 256, made.num_bytes, np.uint8)
    agent.register(made)
    return made


def blocks(memory: SharedMemory, chosen: list[int], into: list[int], sums: Any = None) -> Batch:
    here = memory.address + np.array(into, np.uint64) * np.uint64(BLOCK_BYTES)
    return Batch(here, np.array(chosen, np.uint64) * np.uint64(BLOCK_BYTES), BLOCK_BYTES, sums)


def digest(data: Any) -> str:
    return hashlib.sha256(bytes(data)).hexdigest()


def test_an_engine_reads_our_memory_and_says_when(
    agent: NixlAgent, memory: SharedMemory, engine: Engine
) -> None:
    chosen = [5, 3, 30]
    pieces = [(memory.address + block * BLOCK_BYTES, BLOCK_BYTES) for block in chosen]
    rows = memory.array.reshape(BLOCKS, BLOCK_BYTES)
    assert engine.read(agent, pieces, "request-7 done") == digest(rows[chosen])
    give_up = time.monotonic() + WAIT_S
    while not (notices := agent.notices()) and time.monotonic() < give_up:
        time.sleep(0.001)
    assert notices == {engine.name: [b"request-7 done"]}


def test_an_engine_reads_leased_blocks_of_a_store(agent: NixlAgent, engine: Engine) -> None:
    spec = kvstore.BlockSpec(
        num_layers=2, num_kv_heads=2, head_dim=32, block_tokens=16, dtype="bfloat16"
    )
    kv = np.random.default_rng(1).integers(0, 256, (4, spec.block_bytes), np.uint8)
    hashes = kvstore.hash_blocks(list(range(64)), block_tokens=16)
    with kvstore.open("model", spec=spec, cpu="16MiB") as store:
        store.put(hashes, kvstore.ContiguousBlocks(kv))
        with store.acquire(hashes) as lease:
            found = [agent.register(lease.block(index)) for index in range(4)]
            pieces = [(memory.address, memory.num_bytes) for memory in found]
            assert engine.read(agent, pieces) == digest(kv)
            for one in found:
                agent.deregister(one)


def test_an_engines_layers_are_read_and_verified(
    agent: NixlAgent, memory: SharedMemory, engine: Engine
) -> None:
    link = agent.connect(AgentInfo.decode(engine.info.encode()))
    chosen, into = [31, 0, 7, 8], [0, 1, 2, 3]
    for layer, expected in enumerate(layers()):
        rows = expected.reshape(BLOCKS, BLOCK_BYTES)[chosen]
        addresses = np.array([row.ctypes.data for row in rows], np.uint64)
        sums = checksums_of(addresses, np.full(len(chosen), BLOCK_BYTES, np.uint64))
        sums[2] ^= np.uint64(layer == 1)  # what a producer would have said of other bytes
        statuses = link.read(layer, blocks(memory, chosen, into, sums), timeout=TIMEOUT)
        bad = Status.DAMAGED if layer == 1 else Status.OK
        assert statuses.tolist() == [Status.OK, Status.OK, bad, Status.OK]
        arrived = memory.array.reshape(BLOCKS, BLOCK_BYTES)[into]
        assert np.array_equal(arrived, rows)
    assert link.close()


def test_an_engines_layer_is_written(
    agent: NixlAgent, memory: SharedMemory, engine: Engine
) -> None:
    link = agent.connect(engine.info)
    every = list(range(BLOCKS))
    statuses = link.write(2, blocks(memory, every, every), timeout=TIMEOUT, notice=b"layer 2")
    assert not statuses.any()
    assert engine.ask(digest=2) == digest(memory.array)
    assert engine.ask(digest=1) == digest(layers()[1])
    give_up = time.monotonic() + WAIT_S
    while not (notices := engine.ask(notices=1)) and time.monotonic() < give_up:
        pass
    assert notices == {agent.name: [base64.b64encode(b"layer 2").decode()]}


def test_what_is_not_there_is_refused(
    agent: NixlAgent, memory: SharedMemory, engine: Engine
) -> None:
    link = agent.connect(engine.info)
    statuses = link.read(0, blocks(memory, [1, BLOCKS, 2], [0, 1, 2]), timeout=TIMEOUT)
    assert statuses.tolist() == [Status.OK, Status.REFUSED, Status.OK]
    with pytest.raises(ConfigError, match=f"index: {LAYERS} is none"):
        link.read(LAYERS, blocks(memory, [0], [0]))
    stranger = SharedMemory(BLOCK_BYTES)
    with pytest.raises(ConfigError, match="local_addresses"):
        link.read(0, blocks(stranger, [0], [0]))
    lies = MemoryRange(memory.address, BLOCK_BYTES * BLOCKS)  # not the engine's
    link.peer.ranges.append(lies)
    assert link.read(LAYERS, blocks(memory, [0], [0])).tolist() == [Status.REFUSED]
    with pytest.raises(ConfigError, match="registered already"):
        agent.register(memory)


def test_metadata_of_another_agent_is_refused(agent: NixlAgent, engine: Engine) -> None:
    with pytest.raises(IncompatibleError, match="it is called engine-"):
        agent.connect(AgentInfo("somebody", engine.metadata, []))
    with pytest.raises(IncompatibleError, match="nixl: agent somebody"):
        agent.connect(AgentInfo("somebody", b"no metadata", []))


def lost(link: NixlLink, batch: Batch) -> list[int]:
    """Moves until one does not work: a dead peer is found at the next move, or the one after."""
    give_up = time.monotonic() + WAIT_S
    while time.monotonic() < give_up:
        statuses = link.read(0, batch, timeout=TIMEOUT)
        if statuses.any():
            return [int(status) for status in statuses]
    pytest.fail("moves from a dead engine go on")


def test_a_killed_engine_is_lost_and_memory_settled(
    agent: NixlAgent, memory: SharedMemory, engine: Engine
) -> None:
    link = agent.connect(engine.info)
    batch = blocks(memory, [0, 1], [0, 1])
    assert not link.read(0, batch, timeout=TIMEOUT).any()
    engine.process.kill()
    engine.process.wait()
    assert lost(link, batch) == [Status.LOST, Status.LOST]
    assert link.read(0, batch).tolist() == [Status.LOST, Status.LOST]
    assert not link.is_alive
    assert link.close()
    with pytest.raises(StoreClosedError, match="the link is closed"):
        link.read(0, batch)


@pytest.fixture
def late(tls: str, agent: NixlAgent, memory: SharedMemory, engine: Engine) -> NixlLink:
    """A link with a move that was given up, as the engine stands still."""
    if tls != "tcp":
        pytest.skip("on one host a stopped process's memory is read all the same")
    link = agent.connect(engine.info)
    batch = blocks(memory, list(range(BLOCKS)), list(range(BLOCKS)))
    assert not link.read(0, batch, timeout=TIMEOUT).any()
    engine.process.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    statuses = link.read(0, batch, timeout=0.3)
    assert time.monotonic() - begin < 0.3 + WAIT_S / 4
    assert set(statuses.tolist()) == {Status.LATE}
    assert not link.is_settled
    assert not link.close(timeout=0.1)
    return link


def test_memory_of_a_late_move_is_free_when_the_move_has_ended(
    late: NixlLink, engine: Engine
) -> None:
    engine.process.send_signal(signal.SIGCONT)
    assert late.close(timeout=TIMEOUT)
    assert late.is_settled


def test_memory_of_a_late_move_is_free_when_the_agent_has_ended(
    late: NixlLink, agent: NixlAgent, memory: SharedMemory, engine: Engine
) -> None:
    assert agent.close(timeout=0.1)
    memory.array[:] = 0x5A
    engine.process.send_signal(signal.SIGCONT)
    # It has gone on, and had time to send; NIXL's own process may die of a reader that went.
    with contextlib.suppress(ValueError, BrokenPipeError):
        assert engine.ask(digest=0) == digest(layers()[0])
    assert (memory.array == 0x5A).all()
    with pytest.raises(StoreClosedError, match="the agent is closed"):
        agent.info()


@pytest.mark.parametrize("is_without_rdma", [True, False])
def test_a_process_that_ends_badly_is_known(is_without_rdma: bool) -> None:
    code = (
        "from kvstore_adapters.nixl import NixlAgent, ends_badly\n"
        "NixlAgent().close()\n"
        "print('badly' if ends_badly() else 'well', flush=True)\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        **({"UCX_MODULES": "^ib"} if is_without_rdma else {}),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
        cwd=Path(kvstore.__file__).parents[1],
    )
    words = done.stdout.split()
    assert words
    assert done.returncode == (-signal.SIGSEGV if words[-1] == "badly" else 0)
    if is_without_rdma:
        assert words[-1] == "well"
