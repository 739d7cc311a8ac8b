"""What SGLang needs besides import stubs to run on a CPU: copies between device and host pages in
torch instead of CUDA kernels, host memory that is not pinned, and CUDA's events.

SGLang loads it in every one of its processes (entry point group `sglang.srt.plugins`). None of it
is on the path of our adapters' bytes. While the file that CONTROL_RUN_FILE names exists,
whatever comes out of the store, or from a prefill server, is replaced by zeros before the forward
pass sees it: the control run, whose tokens must differ. While the file beside it with the suffix
HOLD exists, what a prefill server sends waits, and a file with the suffix HELD says so. With the
variable GPU_VARIABLE, a prefill server's KV pools are taken for memory of a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

CONTROL_VARIABLE = "CONTROL_RUN_FILE"
GPU_VARIABLE = "PRETEND_PREFILL_GPU"
HOLD, HELD = ".hold", ".held"
_HOLD_SECONDS_MAX = 60.0
_KV_BYTES_MIN = 4096  # what is shorter is SGLang's own record of a request
_HOST_POOL = "sglang.srt.mem_cache.pool_host.mha.MHATokenToKVPoolHost"
_LOAD_LAYER = "kvstore_adapters.sglang.device_pages.DevicePages.load_layer"
_SEND = "kvstore_adapters.sglang.sessions.Session.write"
_POOL = "kvstore_adapters.sglang.transfer.KVStoreTransfer._pool"
_DEVICE = "kvstore_adapters.sglang.transfer._device"
_POOL_BYTES_MIN = 1 << 20  # what is shorter is SGLang's own records


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_HOST_POOL}.__init__", _unpinned, HookType.BEFORE)
    HookRegistry.register(f"{_HOST_POOL}.backup_from_device_all_layer", _backup, HookType.REPLACE)
    HookRegistry.register(f"{_HOST_POOL}.load_to_device_per_layer", _load, HookType.REPLACE)
    HookRegistry.register(_LOAD_LAYER, _load_layer, HookType.AROUND)
    HookRegistry.register(_SEND, _send, HookType.AROUND)
    if os.environ.get(GPU_VARIABLE):
        from kvstore.gpu.host_device import HostDevice

        gpu = HostDevice()
        HookRegistry.register(_DEVICE, lambda ordinal: gpu, HookType.REPLACE)
        HookRegistry.register(_POOL, functools.partial(_pool, gpu), HookType.AROUND)
    _stand_in_for_cuda()


def install(directory: Path) -> Path:
    """Make `directory`, on the path of imports, an installed distribution with this plugin."""
    information = directory / "kvstore_cpu_plugin-0.1.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kvstore-cpu-plugin\nVersion: 0.1\n"
    )
    entries = [f"kvstore_cpu = {__name__}:register"]
    if "kvstore" not in entry_points(group="sglang.srt.plugins").names:
        # kvstore is on the path, but not installed.
        entries.append("kvstore = kvstore_adapters.sglang.plugin:register")
    (information / "entry_points.txt").write_text("\n".join(["[sglang.srt.plugins]", *entries, ""]))
    return directory


def _is_control_run() -> bool:
    return os.path.exists(os.environ.get(CONTROL_VARIABLE, ""))


def _unpinned(pool: Any, *positional: Any, **named: Any) -> tuple[Any, dict[str, Any]]:
    return (pool, *positional), {**named, "pin_memory": False}


def _rows(pool: Any, layer: int, slots: Any) -> Iterator[tuple[Any, Any, Any]]:
    """The device buffer of K and of V of a layer, the host view of it, and the slots' index."""
    page = pool.page_size
    for device, host in zip(
        (pool.device_k_buffers, pool.device_v_buffers), pool.kv_buffer, strict=True
    ):
        if pool.layout == "layer_first":
            yield device[layer], host[layer], slots
        elif pool.layout == "page_first":
            yield device[layer], host[:, layer], slots
        elif pool.layout == "page_first_direct":
            yield device[layer], host[:, layer], (slots // page, slots % page)
        elif pool.layout == "page_head":
            # [page, head, token, layer, dim]: advanced indices on both sides of a slice move to
            # the front, which gives [slot, head, dim].
            yield device[layer], host[:, :, :, layer], (slots // page, slice(None), slots % page)
        else:
            raise NotImplementedError(f"host layout {pool.layout}")


def _backup(
    pool: Any, device_pool: Any, host_indices: Any, device_indices: Any, io_backend: str
) -> None:
    for layer in range(pool.layer_num):
        for device, host, index in _rows(pool, layer, host_indices):
            host[index] = device[device_indices]


def _load(
    pool: Any,
    device_pool: Any,
    host_indices: Any,
    device_indices: Any,
    layer_id: int,
    io_backend: str,
    *,
    is_draft: bool = False,
) -> None:
    for device, host, index in _rows(pool, layer_id, host_indices):
        device[device_indices] = 0 if _is_control_run() else host[index]


def _load_layer(original: Any, pages: Any, layer: int, pinned: Any, ids: Any) -> None:
    original(pages, layer, pinned, ids)
    if _is_control_run():
        for piece in pages.pieces.layers.get(layer, ()):
            piece[pages.pieces.rows(ids)] = 0


def _send(
    original: Any, session: Any, addresses: Any, peer_addresses: Any, lengths: Any, deadline: float
) -> Any:
    import numpy as np

    control = os.environ.get(CONTROL_VARIABLE, "")
    until = time.monotonic() + _HOLD_SECONDS_MAX
    while os.path.exists(control + HOLD) and time.monotonic() < until:
        Path(control + HELD).touch()
        time.sleep(0.01)
    if _is_control_run():
        zeros = np.zeros(int(lengths.max()), np.uint8)
        addresses = np.where(lengths >= _KV_BYTES_MIN, zeros.ctypes.data, addresses)
        return original(session, addresses.astype(np.uint64), peer_addresses, lengths, deadline)
    return original(session, addresses, peer_addresses, lengths, deadline)


def _pool(
    gpu: Any, original: Any, owner: Any, ptr: int, length: int, is_prefill: bool, is_host: bool
) -> Any:
    import numpy as np

    if is_prefill and length >= _POOL_BYTES_MIN:
        gpu.adopt(np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(ptr)))
        is_host = False
    return original(owner, ptr, length, is_prefill, is_host)


def _stand_in_for_cuda() -> None:
    """What the disaggregation of prefill and decode calls of CUDA whatever the device."""
    import torch

    if torch.cuda.is_available():
        return

    class Event:
        def record(self, stream: Any = None) -> None:
            pass

        def synchronize(self) -> None:
            pass

    def empty(*positional: Any, **named: Any) -> torch.Tensor:
        return plain(*positional, **{**named, "pin_memory": False})

    plain = torch.empty
    torch.empty = empty
    torch.cuda.Event = Event  # type: ignore[assignment,misc]
    torch.cuda.current_stream = torch.cpu.current_stream  # type: ignore[assignment]
