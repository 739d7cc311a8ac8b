"""The stores whose blocks live in another process: what engines of one host can share.

Each starts its servers on loopback or on Unix sockets; they end with the runner. Redis, which is
always a server, is in embedded.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.embedded import Redis
from bench.peers.peer import (
    START_SECONDS,
    STORE_BYTES,
    WORKING_BYTES,
    AbsentError,
    Bytes,
    Peer,
    free_port,
    knock,
    package_version,
    start_server,
    stop_server,
    wait_for,
)

PointerCall = tuple[list[str], list[int], list[int]]

LOOPBACK = "127.0.0.1"
CALL_SECONDS = 30.0


class KVStoreDaemon(Peer):
    """Our daemon over its Unix socket, blocks in place; one thread copies."""

    over_tcp = False

    def __init__(self, work: Path, source: Bytes, target: Bytes) -> None:
        super().__init__(work, source, target)
        try:
            import kvstore
        except ImportError as error:
            raise AbsentError(str(error)) from error
        self.kvstore = kvstore
        path = work / "kvstore.sock"
        self.address = f"unix:{path}"
        command = [sys.executable, "-m", "kvstore", "serve", "--listen", self.address]
        command += ["--cpu", str(STORE_BYTES), "--http", "", "--threads", "1"]
        command += ["--state", str(work / "state")]
        if self.over_tcp:
            endpoint = f"{LOOPBACK}:{free_port()}"
            command += ["--tcp", endpoint]
            self.address = f"tcp:{endpoint}"
        self.server = start_server(command)
        self.stores: dict[int, Any] = {}
        wait_for(self.server, lambda: self._store(1 << 20), kvstore.PeerUnavailableError)
        self.version = "this checkout"
        self.random = np.random.default_rng()

    def _store(self, size: int) -> Any:
        if size not in self.stores:
            spec = self.kvstore.BlockSpec(size >> 16, 8, 128, 16, "float16")
            self.stores[size] = self.kvstore.connect(self.address, spec, timeout=CALL_SECONDS)
        return self.stores[size]

    def use(self, size: int, batch: int) -> None:
        super().use(size, batch)
        self.store = self._store(size)
        self.from_rows = self.kvstore.ContiguousBlocks(self.rows)
        self.to_rows = self.kvstore.ContiguousBlocks(self.back)
        self.chains = [
            self.kvstore.BlockHashes.chain(self.random.integers(0, 256, (batch, 32), np.uint8))
            for _ in range(self.calls)
        ]
        self.ids = [np.array(self.span(call), np.int64) for call in range(self.calls)]

    def put(self, call: int) -> None:
        done = self.store.put(self.chains[call], self.from_rows, self.ids[call]).wait()
        assert done.num_stored == self.batch

    def get(self, call: int) -> None:
        done = self.store.load(self.chains[call], self.to_rows, self.ids[call]).wait()
        assert done.num_blocks == self.batch

    def lookup(self, call: int) -> None:
        assert self.store.lookup(self.chains[call]).num_blocks == self.batch

    def forget(self) -> None:
        self.store.clear()

    def close(self) -> None:
        for store in self.stores.values():
            store.close()
        stop_server(self.server)


class KVStoreTcp(KVStoreDaemon):
    """The same over TCP, where payloads go through the socket."""

    over_tcp = True


class KVStoreMooncake(KVStoreDaemon):
    """The same through our client with Mooncake's methods: values by text keys, at addresses."""

    def __init__(self, work: Path, source: Bytes, target: Bytes) -> None:
        super().__init__(work, source, target)
        from kvstore_adapters.mooncake import MooncakeDistributedStore

        self.client = MooncakeDistributedStore()
        settings = {"master_server_addr": self.address, "timeout": CALL_SECONDS}
        assert self.client.setup(settings) == 0
        for memory in (source, target):
            assert self.client.register_buffer(memory.ctypes.data, memory.size) == 0

    def use(self, size: int, batch: int) -> None:
        super().use(size, batch)
        self.puts, self.gets = pointer_calls(self), pointer_calls(self, self.target)

    def put(self, call: int) -> None:
        assert not any(self.client.batch_put_from(*self.puts[call]))

    def get(self, call: int) -> None:
        assert self.client.batch_get_into(*self.gets[call]) == self.gets[call][2]

    def lookup(self, call: int) -> None:
        assert self.client.batch_is_exist(self.gets[call][0]) == [1] * self.batch

    def forget(self) -> None:
        assert self.client.remove_all() == 0

    def close(self) -> None:
        self.client.close()
        super().close()


def pointer_calls(peer: Peer, memory: Bytes | None = None) -> list[PointerCall]:
    """Keys, addresses in `memory` (default: the source) and sizes of each call."""
    begin = (peer.source if memory is None else memory).ctypes.data
    return [
        (
            [peer.keys[i] for i in peer.span(call)],
            [begin + i * peer.size for i in peer.span(call)],
            [peer.size] * peer.batch,
        )
        for call in range(peer.calls)
    ]


class MooncakeDaemon(Peer):
    """Mooncake Store: `mooncake_client` holds the segment, this is its shared-memory client."""

    def __init__(self, work: Path, source: Bytes, target: Bytes) -> None:
        super().__init__(work, source, target)
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as error:
            raise AbsentError(str(error)) from error
        programs = Path(sys.executable).parent
        self.rpc, metrics, self.service = free_port(), free_port(), free_port()
        command = [str(programs / "mooncake_master"), f"-rpc_address={LOOPBACK}"]
        command += [f"-rpc_port={self.rpc}", f"-metrics_host={LOOPBACK}"]
        command += [f"-metrics_port={metrics}", "-enable_metric_reporting=false"]
        self.master = start_server(command)
        wait_for(self.master, lambda: knock(self.rpc), OSError)
        command = [str(programs / "mooncake_client"), f"-host={LOOPBACK}", f"-port={self.service}"]
        command += [f"-master_server_address={LOOPBACK}:{self.rpc}", "-protocol=tcp"]
        command += ["-metadata_server=P2PHANDSHAKE", f"-global_segment_size={STORE_BYTES >> 20} MB"]
        self.holder = start_server(command)
        wait_for(self.holder, lambda: knock(self.service), OSError)
        self.store = MooncakeDistributedStore()
        self._connect()
        for memory in (self.source, self.target):
            assert self.store.register_buffer(memory.ctypes.data, memory.size) == 0
        # The master learns of the segment a moment after the holder listens.
        give_up = time.monotonic() + START_SECONDS
        while self.store.put("ready", b"1") != 0:
            if time.monotonic() > give_up:
                raise RuntimeError("mooncake holds no segment")
            time.sleep(0.05)
        self.version = package_version("mooncake-transfer-engine-non-cuda")

    def _connect(self) -> None:
        address = f"{LOOPBACK}:{self.service}"
        status = self.store.setup_dummy(3 * WORKING_BYTES, 16 << 20, address)
        if status != 0:
            raise RuntimeError(f"mooncake setup_dummy answered {status}")
        # Such a client copies to and from memory of its own pool only.
        self.source = self._from_pool(self.source)
        self.target = self._from_pool(self.target)

    def _from_pool(self, memory: Bytes) -> Bytes:
        at = self.store.alloc_from_mem_pool(memory.size)
        assert at, "mooncake's pool is too small"
        pooled = np.ctypeslib.as_array((ctypes.c_uint8 * memory.size).from_address(at))
        np.copyto(pooled, memory)
        return pooled

    def use(self, size: int, batch: int) -> None:
        super().use(size, batch)
        self.puts, self.gets = pointer_calls(self), pointer_calls(self, self.target)

    def put(self, call: int) -> None:
        keys, at, sizes = self.puts[call]
        if self.batch == 1:
            assert self.store.put_from(keys[0], at[0], sizes[0]) == 0
        else:
            assert not any(self.store.batch_put_from(keys, at, sizes))

    def get(self, call: int) -> None:
        keys, at, sizes = self.gets[call]
        if self.batch == 1:
            assert self.store.get_into(keys[0], at[0], sizes[0]) == sizes[0]
        else:
            assert self.store.batch_get_into(keys, at, sizes) == sizes

    def lookup(self, call: int) -> None:
        assert self.store.batch_is_exist(self.gets[call][0]) == [1] * self.batch

    def forget(self) -> None:
        self.store.batch_remove(self.keys, True)

    def close(self) -> None:
        self.store.close()
        for server in (self.holder, self.master):
            stop_server(server)


class MooncakeTcp(MooncakeDaemon):
    """The same holder of the segment, over Mooncake's TCP transport."""

    def _connect(self) -> None:
        status = self.store.setup(
            LOOPBACK, "P2PHANDSHAKE", 0, WORKING_BYTES, "tcp", "", f"{LOOPBACK}:{self.rpc}"
        )
        if status != 0:
            raise RuntimeError(f"mooncake setup answered {status}")


def _quiet_lmcache() -> None:
    os.environ.update(
        LMCACHE_TRACK_USAGE="false", LMCACHE_LOG_LEVEL="ERROR", LMCACHE_DISABLE_BANNER="1"
    )


class LMCacheDaemon(Peer):
    """LMCache's multiprocess server, its fastest way on a CPU: the server copies, from and to the
    engine's tensors, which lie in shared memory. A block is one of its chunks.

    Getting is what its engines do: look up, which reads in and locks, then retrieve.
    """

    def __init__(self, work: Path, source: Bytes, target: Bytes) -> None:
        super().__init__(work, source, target)
        _quiet_lmcache()
        try:
            import torch
            import zmq  # type: ignore[import-not-found]
            from lmcache.v1.multiprocess.transport.factory import RequestClientFactory
        except ImportError as error:
            raise AbsentError(str(error)) from error
        torch.set_num_threads(1)
        self.torch = torch
        port, http = free_port(), free_port()
        command = [str(Path(sys.executable).parent / "lmcache"), "server", "--host", LOOPBACK]
        command += ["--port", str(port), "--http-host", LOOPBACK, "--http-port", str(http)]
        command += ["--l1-size-gb", str(STORE_BYTES >> 30), "--no-l1-use-lazy"]
        command += ["--eviction-policy", "LRU", "--chunk-size", "16", "--null-block-id", "-1"]
        command += ["--supported-transfer-mode", "lmcache_driven", "--disable-observability"]
        self.server = start_server(command)
        context = zmq.Context()
        context.setsockopt(zmq.LINGER, 0)
        self.client = RequestClientFactory.create(f"tcp://{LOOPBACK}:{port}", context=context)
        wait_for(
            self.server, lambda: self.client.get_chunk_size().result(timeout=1), TimeoutError, 90.0
        )
        self.version = f"{package_version('lmcache')} multiprocess server"
        self.random = np.random.default_rng()
        self.tensors: dict[int, Any] = {}
        self.transfers: dict[int, Any] = {}

    def _register(self, size: int) -> None:
        from lmcache.utils import EngineType
        from lmcache.v1.multiprocess.group_view import EngineGroupInfo
        from lmcache.v1.multiprocess.transfer_context import create_transfer_context

        rows = self.source.size // size
        # One layer of a model with one plane of KV: a block is one piece of memory.
        tensor = self.torch.zeros((2 * rows, 16, size // 32), dtype=self.torch.float16)
        engine = {"layer.0": tensor}
        transfer = create_transfer_context(
            engine, mode="lmcache_driven", instance_id=size >> 10, req_client=self.client
        )
        transfer.register(
            engine,
            f"bench-{size}",
            1,
            1,
            CALL_SECONDS,
            layout_hints={"kv_layout": "NHD"},
            engine_group_infos=[EngineGroupInfo(0, (0,), 16)],
            engine_type=EngineType.VLLM,
        )
        # It has moved into shared memory by now.
        memory = engine["layer.0"].flatten().view(self.torch.uint8).numpy()
        np.copyto(memory[: self.source.size], self.source)
        self.tensors[size], self.transfers[size] = engine, transfer

    def use(self, size: int, batch: int) -> None:
        if size not in self.tensors:
            self._register(size)
        half = self.source.size
        memory = self.tensors[size]["layer.0"].flatten().view(self.torch.uint8).numpy()
        self.source, self.target = memory[:half], memory[half:]
        super().use(size, batch)
        from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey

        tokens = self.random.integers(0, 1 << 20, (self.calls, 16 * batch)).tolist()

        def key(call: int, worker: int | None) -> Any:
            return IPCCacheServerKey(
                model_name=f"bench-{size}",
                world_size=1,
                num_kv_readers=1,
                worker_id=worker,
                token_ids=tuple(tokens[call]),
                start=0,
                end=16 * batch,
                request_id=f"{self.round}:{call}",
            )

        self.names = [key(call, 0) for call in range(self.calls)]
        self.questions = [key(call, None) for call in range(self.calls)]

    def put(self, call: int) -> None:
        transfer, key = self.transfers[self.size], self.names[call]
        engine, ids = self.tensors[self.size], list(self.span(call))
        done = transfer.submit_store(
            key.request_id, key, engine, [ids], transfer.create_recorded_event(), 1
        )
        assert done.result(timeout=CALL_SECONDS)

    def get(self, call: int) -> None:
        self.lookup(call)
        transfer, key = self.transfers[self.size], self.names[call]
        engine, ids = self.tensors[self.size], [len(self.rows) + i for i in self.span(call)]
        done = transfer.submit_retrieve(
            key.request_id, key, engine, [ids], transfer.create_recorded_event(), 1
        )
        assert done.result(timeout=CALL_SECONDS)

    def lookup(self, call: int) -> None:
        key = self.questions[call]
        self.client.lookup(key, 1).result(timeout=CALL_SECONDS)
        found = self.client.wait_prefetch_status(key.request_id, CALL_SECONDS)
        assert found.result(timeout=CALL_SECONDS) == self.batch

    def forget(self) -> None:
        for key in self.names:
            self.client.end_session(key.request_id).result(timeout=CALL_SECONDS)
        self.client.clear(True).result(timeout=CALL_SECONDS)

    def close(self) -> None:
        self.client.close()
        stop_server(self.server)


class LMCacheTcp(Peer):
    """LMCache's remote server (`lm://`). It acknowledges no put; one ends here with a question on
    the same connection, so that it is timed until the server has the bytes, as all others are.
    """

    def __init__(self, work: Path, source: Bytes, target: Bytes) -> None:
        super().__init__(work, source, target)
        _quiet_lmcache()
        try:
            import torch
            from lmcache.utils import CacheEngineKey
            from lmcache.v1.config import LMCacheEngineConfig
            from lmcache.v1.memory_management import MemoryFormat
            from lmcache.v1.metadata import LMCacheMetadata
            from lmcache.v1.protocol import init_remote_metadata_info
            from lmcache.v1.storage_backend.connector.lm_connector import LMCServerConnector
            from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        except ImportError as error:
            raise AbsentError(str(error)) from error
        torch.set_num_threads(1)
        self.torch, self.key, self.format = torch, CacheEngineKey, MemoryFormat.KV_2LTD
        port = free_port()
        program = str(Path(sys.executable).parent / "lmcache_server")
        self.server = start_server([program, LOOPBACK, str(port)])
        wait_for(self.server, lambda: knock(port), OSError, 90.0)
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=256, local_cpu=True, max_local_cpu_size=STORE_BYTES >> 30
        )
        metadata = LMCacheMetadata(
            model_name="bench",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.float16,
            kv_shape=(8, 2, 256, 8, 128),
        )
        init_remote_metadata_info(1)
        self.memory = LocalCPUBackend(config, metadata, dst_device="cpu")
        self.loop = asyncio.new_event_loop()
        self.remote = LMCServerConnector(LOOPBACK, port, self.loop, self.memory)
        # Left as it is, the question after a put would wait 40 ms for a delayed acknowledgement.
        self.remote.client_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.version = f"{package_version('lmcache')} lm:// server"

    def use(self, size: int, batch: int) -> None:
        super().use(size, batch)
        self.from_rows = self.torch.from_numpy(self.rows)
        self.to_rows = self.torch.from_numpy(self.back)
        self.shape = self.torch.Size([2, 8, size // 32, 1])  # of float16
        # That server never forgets: a round's keys are those of the round before.
        self.hashes = [
            self.key("bench", 1, 0, i | size << 32, self.torch.float16)
            for i in range(len(self.rows))
        ]

    def put(self, call: int) -> None:
        async def send() -> None:
            for i in self.span(call):
                block = self.memory.allocate(self.shape, self.torch.float16, self.format)
                block.tensor.view(self.torch.uint8).flatten().copy_(self.from_rows[i])
                await self.remote.put(self.hashes[i], block)
                block.ref_count_down()
            assert await self.remote.exists(self.hashes[i])

        self.loop.run_until_complete(send())

    def get(self, call: int) -> None:
        async def receive() -> None:
            for i in self.span(call):
                block = await self.remote.get(self.hashes[i])
                self.to_rows[i].copy_(block.tensor.view(self.torch.uint8).flatten())
                block.ref_count_down()

        self.loop.run_until_complete(receive())

    def lookup(self, call: int) -> None:
        async def ask() -> None:
            for i in self.span(call):
                assert await self.remote.exists(self.hashes[i])

        self.loop.run_until_complete(ask())

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.loop.run_until_complete(self.remote.close())
        stop_server(self.server)


PEERS: dict[str, type[Peer]] = {
    "kvstore_unix": KVStoreDaemon,
    "kvstore_tcp": KVStoreTcp,
    "kvstore_mooncake": KVStoreMooncake,
    "redis": Redis,
    "mooncake_shm": MooncakeDaemon,
    "mooncake_tcp": MooncakeTcp,
    "lmcache_mp": LMCacheDaemon,
    "lmcache_tcp": LMCacheTcp,
}
