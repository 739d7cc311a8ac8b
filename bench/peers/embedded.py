"""The stores that live in the process that uses them, and Redis, which has no such form."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.peer import (
    START_SECONDS,
    STORE_BYTES,
    WORKING_BYTES,
    AbsentError,
    Bytes,
    Peer,
    aligned,
    free_port,
    knock,
    package_version,
    start_server,
    stop_server,
    wait_for,
)


class Memcpy(Peer):
    """numpy's copy between touched arrays: the limit."""

    version = f"numpy {np.__version__}"

    def __init__(self, work: Path, source: Bytes, target: Bytes) -> None:
        super().__init__(work, source, target)
        self.plain = aligned(source.size)

    def _slice(self, call: int) -> slice:
        return slice(call * self.batch * self.size, (call + 1) * self.batch * self.size)

    def put(self, call: int) -> None:
        part = self._slice(call)
        np.copyto(self.plain[part], self.source[part])

    def get(self, call: int) -> None:
        part = self._slice(call)
        np.copyto(self.target[part], self.plain[part])


class KVStore(Peer):
    """Ours, embedded, one thread."""

    def __init__(self, work: Path, source: Bytes, target: Bytes) -> None:
        super().__init__(work, source, target)
        try:
            import kvstore
        except ImportError as error:
            raise AbsentError(str(error)) from error
        self.kvstore = kvstore
        self.stores: dict[int, Any] = {}
        self.version = "this checkout"
        self.random = np.random.default_rng()

    def use(self, size: int, batch: int) -> None:
        super().use(size, batch)
        if size not in self.stores:
            spec = self.kvstore.BlockSpec(size >> 16, 8, 128, 16, "float16")
            self.stores[size] = self.kvstore.open(spec, cpu=WORKING_BYTES * 3 // 2, threads=1)
        self.store = self.stores[size]
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

    def forget(self) -> None:
        self.store.clear()

    def close(self) -> None:
        for store in self.stores.values():
            store.close()


class Redis(Peer):
    """redis-server without persistence, over a Unix socket, by redis-py with hiredis."""

    def __init__(self, work: Path, source: Bytes, target: Bytes) -> None:
        super().__init__(work, source, target)
        program = shutil.which("redis-server")
        if program is None:
            raise AbsentError("no redis-server")
        try:
            import redis
        except ImportError as error:
            raise AbsentError(str(error)) from error
        path = work / "redis.sock"
        command = [program, "--port", "0", "--unixsocket", str(path), "--save", ""]
        command += ["--appendonly", "no", "--dir", str(work), "--maxmemory", str(STORE_BYTES)]
        self.server = start_server(command)
        self.client = redis.Redis(unix_socket_path=str(path), socket_timeout=START_SECONDS)
        wait_for(self.server, self.client.ping, redis.ConnectionError)
        self.version = f"{self.client.info()['redis_version']}, redis-py {redis.__version__}"

    def put(self, call: int) -> None:
        if self.batch == 1:
            self.client.set(self.keys[call], memoryview(self.rows[call]))
            return
        with self.client.pipeline(transaction=False) as pipeline:  # half the time of mset
            for i in self.span(call):
                pipeline.set(self.keys[i], memoryview(self.rows[i]))
            pipeline.execute()

    def get(self, call: int) -> None:
        if self.batch == 1:
            found: list[Any] = [self.client.get(self.keys[call])]
        else:
            found = list(self.client.mget([self.keys[i] for i in self.span(call)]))
        for i, value in zip(self.span(call), found, strict=True):
            np.copyto(self.back[i], np.frombuffer(value, np.uint8))

    def lookup(self, call: int) -> None:
        assert self.client.exists(*(self.keys[i] for i in self.span(call))) == self.batch

    def forget(self) -> None:
        self.client.flushall()

    def close(self) -> None:
        self.client.close()
        stop_server(self.server)


class Lmdb(Peer):
    """LMDB on tmpfs or in the page cache, without syncs; a transaction a call."""

    def __init__(self, work: Path, source: Bytes, target: Bytes) -> None:
        super().__init__(work, source, target)
        try:
            import lmdb
        except ImportError as error:
            raise AbsentError(str(error)) from error
        self.environment = lmdb.open(
            str(work / "lmdb"),
            map_size=STORE_BYTES,
            sync=False,
            metasync=False,
            writemap=True,
            map_async=True,
            readahead=False,
            meminit=False,
        )
        self.version = f"{'.'.join(map(str, lmdb.version()))}, py-lmdb {lmdb.__version__}"

    def put(self, call: int) -> None:
        with self.environment.begin(write=True) as transaction:
            for i in self.span(call):
                transaction.put(self.keys[i].encode(), memoryview(self.rows[i]))

    def get(self, call: int) -> None:
        with self.environment.begin(buffers=True) as transaction:
            for i in self.span(call):
                value = transaction.get(self.keys[i].encode(), b"")
                np.copyto(self.back[i], np.frombuffer(value, np.uint8))

    def forget(self) -> None:
        with self.environment.begin(write=True) as transaction:
            transaction.drop(self.environment.open_db(), delete=False)

    def close(self) -> None:
        self.environment.close()


class Mooncake(Peer):
    """Mooncake Store: this process holds the segment, buffers are registered, protocol tcp."""

    def __init__(self, work: Path, source: Bytes, target: Bytes) -> None:
        super().__init__(work, source, target)
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as error:
            raise AbsentError(str(error)) from error
        master = Path(sys.executable).parent / "mooncake_master"
        rpc, metrics = free_port(), free_port()
        command = [str(master), "-rpc_address=127.0.0.1", f"-rpc_port={rpc}"]
        command += ["-metrics_host=127.0.0.1", f"-metrics_port={metrics}"]
        command += ["-enable_metric_reporting=false"]
        self.server = start_server(command)
        wait_for(self.server, lambda: knock(rpc), OSError)
        self.store = MooncakeDistributedStore()
        address = "127.0.0.1"
        status = self.store.setup(
            address, "P2PHANDSHAKE", STORE_BYTES, WORKING_BYTES, "tcp", "", f"{address}:{rpc}"
        )
        if status != 0:
            raise RuntimeError(f"mooncake setup answered {status}")
        for memory in (source, target):
            assert self.store.register_buffer(memory.ctypes.data, memory.size) == 0
        self.version = package_version("mooncake-transfer-engine-non-cuda")

    def use(self, size: int, batch: int) -> None:
        super().use(size, batch)

        def arguments(memory: Bytes, call: int) -> tuple[list[str], list[int], list[int]]:
            at = [memory.ctypes.data + i * size for i in self.span(call)]
            return [self.keys[i] for i in self.span(call)], at, [size] * batch

        self.puts = [arguments(self.source, call) for call in range(self.calls)]
        self.gets = [arguments(self.target, call) for call in range(self.calls)]

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

    def forget(self) -> None:
        self.store.batch_remove(self.keys, True)

    def close(self) -> None:
        self.store.close()
        stop_server(self.server)


class LMCache(Peer):
    """LMCache's LocalCPUBackend, in process: its shortest way, without its server."""

    def __init__(self, work: Path, source: Bytes, target: Bytes) -> None:
        super().__init__(work, source, target)
        os.environ.update(LMCACHE_TRACK_USAGE="false", LMCACHE_LOG_LEVEL="ERROR")
        try:
            import torch
            from lmcache.utils import CacheEngineKey
            from lmcache.v1.config import LMCacheEngineConfig
            from lmcache.v1.metadata import LMCacheMetadata
            from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        except ImportError as error:
            raise AbsentError(str(error)) from error
        torch.set_num_threads(1)
        self.torch, self.key = torch, CacheEngineKey
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
        self.backend = LocalCPUBackend(config, metadata, dst_device="cpu")
        self.version = package_version("lmcache")

    def use(self, size: int, batch: int) -> None:
        super().use(size, batch)
        self.from_rows = self.torch.from_numpy(self.rows)
        self.to_rows = self.torch.from_numpy(self.back)
        self.shape = self.torch.Size([2, 8, size // 32, 1])  # of float16
        self.hashes = [
            self.key("bench", 1, 0, self.round << 32 | i, self.torch.float16)
            for i in range(len(self.rows))
        ]

    def put(self, call: int) -> None:
        span = self.span(call)
        made = self.backend.batched_allocate(
            self.shape, self.torch.float16, self.batch, busy_loop=False
        )
        for i, block in zip(span, made, strict=True):
            block.tensor.view(self.torch.uint8).flatten().copy_(self.from_rows[i])
        self.backend.batched_submit_put_task([self.hashes[i] for i in span], made)
        for block in made:
            block.ref_count_down()

    def get(self, call: int) -> None:
        span = self.span(call)
        found = self.backend.batched_get_blocking([self.hashes[i] for i in span])
        for i, block in zip(span, found, strict=True):
            self.to_rows[i].copy_(block.tensor.view(self.torch.uint8).flatten())
            block.ref_count_down()

    def forget(self) -> None:
        self.backend.clear()


PEERS: dict[str, type[Peer]] = {
    "memcpy": Memcpy,
    "kvstore": KVStore,
    "redis": Redis,
    "lmdb": Lmdb,
    "mooncake": Mooncake,
    "lmcache": LMCache,
}
