"""NixlAgent: memory of this process, registered with NIXL, for its peers and for moves of ours.

    with NixlAgent() as agent:
        agent.register(shared_memory)                  # peers may read and write it from now on
        send(agent.info().encode())
        link = agent.connect(AgentInfo.decode(received))
        statuses = link.read(0, Batch(addresses, offsets, 65536, checksums), timeout=2.0)

An engine that has an agent of its own needs nothing of ours at its side: it adds
`agent.info().metadata`, and reads the addresses in `ranges`; the other way round, `AgentInfo` is
made of what it says, see `ranges_of_blocks`.

NIXL authenticates nobody and checks nothing: its agents listen on all of UCX's devices, and who has
the metadata reads and writes all that is registered. Name `devices`, on a network that you trust.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import weakref
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import ConfigError, IncompatibleError, StoreClosedError
from kvstore.transport import SharedMemory
from kvstore_adapters.nixl import binding
from kvstore_adapters.nixl.describe import AgentInfo, Kind, MemoryRange
from kvstore_adapters.nixl.link import Core, NixlLink

Memory = SharedMemory | npt.NDArray[Any] | tuple[int, int]


class NixlAgent:
    """Thread safety: all methods may be called from any thread; calls into NIXL go one by one.

    Args:
        name: unlike any peer's; default: random.
        devices: UCX's network devices, with commas; default: all.

    Raises:
        ConfigError: NIXL is not installed, or cannot work here.
    """

    def __init__(self, name: str = "", *, devices: str = "") -> None:
        nixl = binding.load()
        self.name = name or f"kvstore-{os.getpid()}-{secrets.token_hex(8)}"
        self._registered: dict[MemoryRange, tuple[Any, Memory]] = {}
        self._links: list[NixlLink] = []
        self._closed = False
        try:
            agent = nixl.nixl_agent(self.name, nixl.nixl_agent_config(backends=[]))
            options = agent.get_plugin_params("UCX")
            agent.create_backend("UCX", {**options, "ucx_devices": devices})
        except Exception as error:  # (NIXL's errors have no common base)
            raise ConfigError(f"nixl: no agent with UCX: {error}") from error
        self._core = Core(agent)
        self._lock = self._core.lock
        binding.warn_of_end()

    def register(self, memory: Memory, *, kind: Kind = "DRAM", device: int = 0) -> MemoryRange:
        """Let peers read and write memory, and moves of ours end and begin there.

        Args:
            memory: SharedMemory; a contiguous array; or address and length. It stays as it is
                until `deregister` or `close`.
            kind: "VRAM" for a GPU's, with its `device`.

        Raises:
            ConfigError: no such memory, or NIXL refuses it.
        """
        if isinstance(memory, SharedMemory):
            address, num_bytes = memory.address, memory.num_bytes
        elif isinstance(memory, tuple):
            address, num_bytes = memory
        else:
            if not memory.flags.c_contiguous:
                raise ConfigError("memory: the array is not contiguous")
            address, num_bytes = memory.ctypes.data, memory.nbytes
        found = MemoryRange(address, num_bytes, device, kind)
        if address <= 0 or num_bytes <= 0:
            raise ConfigError(f"memory: {found} is none")
        with self._lock:
            self._check_open()
            if found in self._registered:
                raise ConfigError(f"memory: {found} is registered already")
            try:
                held = self._core.agent.register_memory([(address, num_bytes, device, "")], kind)
            except Exception as error:
                raise ConfigError(f"nixl: memory {found}: {error}") from error
            self._registered[found] = (held, memory)
        return found

    def deregister(self, memory: MemoryRange) -> None:
        """Let nobody use it any more.

        Moves must have ended: NIXL does not wait for those of peers, of which it does not know.
        Have peers say when they are done, by a notice or otherwise.
        """
        with self._lock:
            held = self._registered.pop(memory, None)
            if held is not None and not self._closed:
                self._core.agent.deregister_memory(held[0])

    def info(self) -> AgentInfo:
        """What peers must know. Anew after each `register`."""
        with self._lock:
            self._check_open()
            metadata = bytes(self._core.agent.get_agent_metadata())
            return AgentInfo(self.name, metadata, list(self._registered))

    def connect(self, peer: AgentInfo) -> NixlLink:
        """Get ready to read and write a peer's ranges; the first move connects.

        Raises:
            IncompatibleError: NIXL cannot take its metadata, or it names another agent.
        """
        with self._lock:
            self._check_open()
            try:
                name = self._core.agent.add_remote_agent(peer.metadata)
            except Exception as error:
                raise IncompatibleError(f"nixl: agent {peer.name}: {error}") from error
            name = name.decode() if isinstance(name, bytes) else str(name)
            if name != peer.name:
                self._core.agent.remove_remote_agent(name)
                raise IncompatibleError(f"nixl: agent {peer.name}: it is called {name}")
            link = NixlLink(self._core, peer, self._is_ours)
            self._links.append(link)
        return link

    def notices(self) -> dict[str, list[bytes]]:
        """What peers have said at the end of their moves since the last call, by their names."""
        with self._lock:
            self._check_open()
            said: dict[str, list[bytes]] = self._core.agent.get_new_notifs()
        return {str(name): list(notices) for name, notices in said.items()}

    def _is_ours(
        self, addresses: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint64]
    ) -> MemoryRange | None:
        """The registered range that has all of these pieces."""
        if len(addresses) == 0:
            return None
        begin, end = int(addresses.min()), int((addresses + lengths).max())
        for memory in list(self._registered):
            if memory.address <= begin and end <= memory.address + memory.num_bytes:
                return memory
        return None

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the agent is closed")

    def close(self, timeout: float = 5.0) -> bool:
        """End all links, then NIXL's agent. True: no move writes into our memory any more, of ours
        or of peers. False: another thread is in a call of the agent; memory must stay as it is.
        """
        with self._lock:
            if self._closed:
                return self._core.agent is None
            self._closed = True
        for link in self._links:
            link.close(timeout)
            link.abandon()
        with self._lock:
            agent, self._core.agent = self._core.agent, None
            for held, _ in self._registered.values():
                with contextlib.suppress(
                    Exception
                ):  # with moves under way; the agent's end is theirs
                    agent.deregister_memory(held)
            self._registered.clear()
            ended = weakref.ref(agent)
            del agent
        return ended() is None

    def __enter__(self) -> NixlAgent:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
