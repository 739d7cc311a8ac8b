"""MooncakeDistributedStore: Mooncake Store's client, as far as engines use it, on a kvstore daemon.

    from kvstore_adapters.mooncake import MooncakeDistributedStore, ReplicateConfig

Arguments and answers are Mooncake's: numbers instead of exceptions, memory as addresses, `b""` for
a value that is not there. What is ours: the address of the "master" is a kvstore daemon's; memory
must be registered before it is read or written at its address; and no call crashes before `setup`
or after `close`, they answer -600 or that there is nothing.

docs/engines/mooncake.md says how the settings map, and what is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

import kvstore

from .codes import (
    HEALTHY,
    INVALID_PARAMS,
    NOT_SET_UP,
    OBJECT_NOT_FOUND,
    OK,
    RPC_FAIL,
    UNAVAILABLE_IN_CURRENT_MODE,
    UNREACHABLE,
)
from .memory import Pieces, Regions, bytes_of, is_host_memory
from .objects import Objects
from .sessions import Sessions
from .setup import Setup
from .types import ReplicaDescriptor, ReplicateConfig, ValueBuffer

logger = logging.getLogger(__name__)

_Value = TypeVar("_Value")
_Array = npt.NDArray[np.uint8]
_Lists = Sequence[Sequence[int]]
_Targets = list[Pieces | None]
_AWAY = (kvstore.PeerUnavailableError, kvstore.DeadlineExceededError)


class MooncakeDistributedStore:
    """See above.

    Thread safety: `setup` and `close` on one thread, everything else on any.
    """

    def __init__(self) -> None:
        self._objects: Objects | None = None
        self._regions = Regions()
        self._sessions = Sessions()
        self._setup: Setup | None = None

    # --- begin and end

    def setup(  # noqa: PLR0913, PLR0917  Mooncake's arguments
        self,
        local_hostname: str | dict[str, Any],
        metadata_server: str = "",
        global_segment_size: int = 0,
        local_buffer_size: int = 0,
        protocol: str = "tcp",
        rdma_devices: str = "",
        master_server_addr: str = "",
        engine: object = None,
        enable_ssd_offload: bool = False,
        ssd_offload_path: str = "",
        tenant_id: str = "default",
        enable_client_http_server: bool = False,
        client_http_port: int = 0,
        *,
        timeout: float = 1.0,
        token_file: str = "",
        kvstore_tenant: str = "",
        require_registration: bool = True,
    ) -> int:
        """Connect to a daemon. Or `setup(settings)`, with a dictionary of these.

        Args:
            local_hostname: what `get_hostname` answers.
            master_server_addr: the daemon: "unix:/path/to.sock", "tcp:host:port" or "host:port".
            tenant_id: values of different tenants do not meet; no protection, a name only.
            timeout: seconds that the daemon has to answer one request.
            kvstore_tenant, token_file: who we are, where the daemon knows tenants.
            require_registration: refuse addresses outside of registered memory.

        Returns:
            0, or RPC_FAIL when nobody answers there, INVALID_PARAMS when we are refused. The reason
            is logged. All other arguments are taken and have no effect: memory and disk are the
            daemon's.
        """
        if isinstance(local_hostname, dict):
            return self._open(Setup.of(local_hostname))
        return self._open(
            Setup(
                master_server_addr,
                local_hostname,
                tenant_id,
                timeout,
                token_file,
                kvstore_tenant,
                require_registration,
            )
        )

    def _open(self, setup: Setup) -> int:
        if self._objects is not None:
            return OK
        opened = setup.open()
        if isinstance(opened, int):
            return opened
        self._setup, self._objects = setup, opened
        return OK

    def setup_dummy(self, mem_pool_size: int, local_buffer_size: int, server_address: str) -> int:
        """As `setup`: to a daemon on this host every client of ours is such a light one."""
        return self._open(Setup(server_address, "localhost"))

    def close(self) -> int:
        objects, self._objects = self._objects, None
        if objects is not None:
            objects.close()
            self._sessions = Sessions()
            self._regions = Regions()
            self._setup = None
        return OK

    def health_check(self) -> int:
        def check(objects: Objects) -> int:
            is_reached = "kvstore_cpu_capacity_bytes" in objects.index.stats()
            return HEALTHY if is_reached else UNREACHABLE

        return self._ask(check, lambda code: NOT_SET_UP if code == INVALID_PARAMS else UNREACHABLE)

    def get_hostname(self) -> str:
        return self._setup.local_hostname if self._setup is not None else ""

    # --- memory

    def register_buffer(self, buffer_ptr: int, size: int) -> int:
        """Let the other methods read and write this memory, which has to be the host's."""
        if self._objects is None or size <= 0:
            return INVALID_PARAMS
        if not is_host_memory(buffer_ptr, size):
            logger.error("register_buffer: %d bytes at %#x: not the host's", size, buffer_ptr)
            return INVALID_PARAMS
        return OK if self._regions.add(buffer_ptr, size) else INVALID_PARAMS

    def unregister_buffer(self, buffer_ptr: int) -> int:
        return OK if self._regions.remove(buffer_ptr) else INVALID_PARAMS

    # --- looking

    def is_exist(self, key: str) -> int:
        return self.batch_is_exist([key])[0]

    def batch_is_exist(self, keys: Sequence[str]) -> list[int]:
        """1 where the whole value can be read, 0 where not."""
        return self._ask(
            lambda objects: objects.exist(objects.find(keys)).astype(int).tolist(),
            lambda code: [code] * len(keys),
        )

    def get_size(self, key: str) -> int:
        def size(objects: Objects) -> int:
            entries = objects.find([key])
            return int(entries["num_bytes"][0]) if objects.exist(entries)[0] else OBJECT_NOT_FOUND

        return self._ask(size, _code)

    def batch_get_replica_desc(self, keys: Sequence[str]) -> dict[str, list[ReplicaDescriptor]]:
        """Where each value that is there would be read: one "replica", in memory or on disk."""

        def describe(objects: Objects) -> dict[str, list[ReplicaDescriptor]]:
            entries = objects.find(keys)
            there = np.flatnonzero(objects.exist(entries)).tolist()
            return {
                keys[place]: [ReplicaDescriptor(objects.in_memory(entries[place]))]
                for place in there
            }

        return self._ask(describe, lambda _: {})

    def get_replica_desc(self, key: str) -> list[ReplicaDescriptor]:
        return self.batch_get_replica_desc([key]).get(key, [])

    # --- writing

    def put(self, key: str, value: Any, config: ReplicateConfig | None = None) -> int:
        array = bytes_of(value)
        return self._put([key], [Pieces.of(array)])[0]

    def put_batch(
        self, keys: Sequence[str], values: Sequence[Any], config: ReplicateConfig | None = None
    ) -> int:
        """Return the first code that is not 0. Nothing is stored where a value is empty."""
        arrays = [bytes_of(value) for value in values]
        sources = [Pieces.of(array) for array in arrays]
        if len(keys) != len(sources) or None in sources:
            return INVALID_PARAMS
        return next((code for code in self._put(keys, sources) if code != OK), OK)

    def put_parts(self, key: str, *parts: Any, config: ReplicateConfig | None = None) -> int:
        """Store the concatenation; without any bytes there is nothing to do."""
        arrays = [array for array in map(bytes_of, parts) if array.nbytes]
        return self.put(key, np.concatenate(arrays)) if arrays else OK

    def put_from(
        self, key: str, buffer_ptr: int, size: int, config: ReplicateConfig | None = None
    ) -> int:
        return self.batch_put_from([key], [buffer_ptr], [size], config)[0]

    def batch_put_from(
        self,
        keys: Sequence[str],
        buffer_ptrs: Sequence[int],
        sizes: Sequence[int],
        config: ReplicateConfig | None = None,
    ) -> list[int]:
        return self._put_from(keys, [[at] for at in buffer_ptrs], [[size] for size in sizes])

    def batch_put_from_multi_buffers(
        self,
        keys: Sequence[str],
        all_buffer_ptrs: _Lists,
        all_sizes: _Lists,
        config: ReplicateConfig | None = None,
    ) -> list[int]:
        """A value is the concatenation of its pieces."""
        return self._put_from(keys, all_buffer_ptrs, all_sizes)

    def _put_from(self, keys: Sequence[str], all_addresses: _Lists, all_sizes: _Lists) -> list[int]:
        return self._put(keys, self._pieces(keys, all_addresses, all_sizes))

    def _put(self, keys: Sequence[str], sources: _Targets) -> list[int]:
        """Of a key that comes twice, the first value counts."""
        chosen: dict[str, Pieces] = {}
        for key, source in zip(keys, sources, strict=True):
            if key and source is not None:
                chosen.setdefault(key, source)

        def put(objects: Objects) -> list[int]:
            codes = objects.put(list(chosen), list(chosen.values()))
            code_of = dict(zip(chosen, codes, strict=True))
            return [
                INVALID_PARAMS if source is None else code_of.get(key, INVALID_PARAMS)
                for key, source in zip(keys, sources, strict=True)
            ]

        return self._ask(put, lambda code: [code] * len(keys))

    # --- reading

    def get(self, key: str) -> bytes:
        """The value, or `b""`."""
        return self.get_batch([key])[0]

    def get_batch(self, keys: Sequence[str]) -> list[bytes]:
        return [b"" if value is None else value.tobytes() for value in self._values(keys)]

    def get_buffer(self, key: str) -> ValueBuffer | None:
        return self.batch_get_buffer([key])[0]

    def batch_get_buffer(self, keys: Sequence[str]) -> list[ValueBuffer | None]:
        return [None if value is None else ValueBuffer(value) for value in self._values(keys)]

    def get_into(self, key: str, buffer_ptr: int, size: int) -> int:
        return self.batch_get_into([key], [buffer_ptr], [size])[0]

    def batch_get_into(
        self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        """Return how many bytes each value has; its buffer may be longer."""
        all_addresses, all_sizes = [[at] for at in buffer_ptrs], [[size] for size in sizes]
        return self._get_into(keys, all_addresses, all_sizes, exact=False)

    def batch_get_into_multi_buffers(
        self,
        keys: Sequence[str],
        all_buffer_ptrs: _Lists,
        all_sizes: _Lists,
        prefer_alloc_in_same_node: bool = False,
    ) -> list[int]:
        """Return how many bytes each value has; its pieces must have that many together."""
        return self._get_into(keys, all_buffer_ptrs, all_sizes, exact=True)

    def _get_into(
        self,
        keys: Sequence[str],
        all_addresses: _Lists,
        all_sizes: _Lists,
        *,
        exact: bool,
    ) -> list[int]:
        targets = self._pieces(keys, all_addresses, all_sizes)
        sound = [place for place, target in enumerate(targets) if target is not None]

        def get(objects: Objects) -> list[int]:
            codes = [INVALID_PARAMS] * len(keys)
            entries = objects.find([keys[place] for place in sound])
            wanted = [target for target in targets if target is not None]
            for place, code in zip(sound, objects.get(entries, wanted, exact=exact), strict=True):
                codes[place] = code
            return codes

        return self._ask(get, lambda code: [code] * len(keys))

    def _values(self, keys: Sequence[str]) -> list[_Array | None]:
        return self._ask(lambda objects: objects.values(keys), lambda _: [None] * len(keys))

    # --- reading in ranges

    def batch_get_session_start(self, keys: Sequence[str]) -> list[int]:
        """Load values to be read in ranges; they stay until as many sessions ended as began."""

        def start(objects: Objects) -> list[int]:
            return self._sessions.start(keys, objects.find, objects.values)

        return self._ask(start, lambda code: [code] * len(keys))

    def batch_get_session_end(self, keys: Sequence[str]) -> int:
        self._sessions.end(keys)
        return OK

    def batch_get_into_multi_buffer_ranges(
        self,
        keys: Sequence[str],
        all_buffer_ptrs: _Lists,
        all_sizes: _Lists,
        all_src_offsets: _Lists,
    ) -> list[int]:
        """Copy from values of a session: size bytes from each offset to each address."""
        targets = self._pieces(keys, all_buffer_ptrs, all_sizes)
        if len(all_src_offsets) != len(keys):
            return [INVALID_PARAMS] * len(keys)
        return [
            INVALID_PARAMS if target is None else self._sessions.copy(key, offsets, target)
            for key, offsets, target in zip(keys, all_src_offsets, targets, strict=True)
        ]

    # --- removing

    def remove(self, key: str, force: bool = False) -> int:
        return self.batch_remove([key], force)[0]

    def batch_remove(self, keys: Sequence[str], force: bool = False) -> list[int]:
        """Readers that are under way go on; so there is nothing to force."""
        return self._ask(lambda objects: objects.remove(keys), lambda code: [code] * len(keys))

    def remove_all(self, force: bool = False) -> int:
        """Remove what this tenant has. Returns 0: how many there were is not known."""

        def clear(objects: Objects) -> int:
            objects.clear()
            return OK

        return self._ask(clear, _code)

    def remove_by_regex(self, regex_pattern: str, force: bool = False) -> int:
        """Not possible: kvstore keeps hashes of keys."""
        logger.error("remove_by_regex(%r): kvstore keeps hashes of keys", regex_pattern)
        return UNAVAILABLE_IN_CURRENT_MODE

    # ---

    def _pieces(self, keys: Sequence[str], all_addresses: _Lists, all_sizes: _Lists) -> _Targets:
        """The memory for each key; None where it is none, or not ours to touch."""
        if not len(keys) == len(all_addresses) == len(all_sizes):
            return [None] * len(keys)
        is_strict = self._setup is None or self._setup.require_registration
        return self._regions.pieces(all_addresses, all_sizes, is_strict=is_strict)

    def _ask(self, work: Callable[[Objects], _Value], otherwise: Callable[[int], _Value]) -> _Value:
        """What `work` returns, or what `otherwise` makes of a code."""
        objects = self._objects
        if objects is None:
            return otherwise(INVALID_PARAMS)
        try:
            return work(objects)
        except kvstore.StoreClosedError:
            return otherwise(INVALID_PARAMS)
        except kvstore.KVStoreError as error:
            logger.warning("%s", error)
            return otherwise(RPC_FAIL if isinstance(error, _AWAY) else INVALID_PARAMS)


def _code(code: int) -> int:
    return code
