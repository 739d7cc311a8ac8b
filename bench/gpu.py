"""How fast do blocks get from a GPU's pages to the arena and back, against plain pinned copies?

16-token blocks of an 8B model (32 layers, 8 KV heads of 128, bfloat16: 2 MiB) lie in vLLM's layout,
a K and a V tensor for each layer, so that a block is 64 pieces. Both sides of a ratio take turns in
one run; both move the same bytes between the same GPU and the same registered memfd.

    python bench/gpu.py --json                   # needs a GPU, and CuPy with NVRTC
    python bench/gpu.py --fake build/fake-cuda/libfakecuda-*.so --quick   # runs the code, no more
"""

from __future__ import annotations

import argparse
import base64
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvstore import BlockSpec, KVStoreError
from kvstore.bench.report import Figure, Report
from kvstore.gpu import CudaDevice, DeviceBlocks
from kvstore.gpu.copies import ArenaCopies, Way
from kvstore.gpu.driver import Driver
from kvstore.gpu.modules import cached_kernels
from kvstore.gpu.registration import HostRegistration
from kvstore.transport import Batch, Endpoint, EndpointInfo, SharedMemory, TransportSettings

SPEC = BlockSpec(32, 8, 128, 16, "float16")  # as wide as bfloat16, which a tensor here cannot name
BLOCK = SPEC.block_bytes


class Tensor:
    """Memory of the GPU in a shape."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "<f2",
            "data": (address, False),
            "version": 3,
        }


class Setup:
    """Pages, an arena, and streams."""

    def __init__(self, library: str, num_blocks: int, rounds: int) -> None:
        compiler = (lambda capability: b"\x7fELF") if library else cached_kernels
        driver = Driver(library) if library else Driver()
        self.library = library
        self.device = CudaDevice(driver=driver, compiler=compiler)
        self.num_blocks, self.rounds = num_blocks, rounds
        num_pages = 2 * num_blocks
        self.pages = self.device.allocate(num_pages * BLOCK)
        layer = num_pages * SPEC.layer_bytes
        shape = (2, num_pages, SPEC.block_tokens, SPEC.num_kv_heads, SPEC.head_dim)
        self.blocks = DeviceBlocks.paged(
            self.device,
            "vllm_nhd",
            [Tensor(self.pages.address + i * layer, shape) for i in range(SPEC.num_layers)],
            SPEC,
        )
        self.plain = self.device.allocate(num_blocks * BLOCK)
        self.arena = SharedMemory(num_blocks * BLOCK)
        self.host = HostRegistration(self.device, self.arena.array)
        self.copies = ArenaCopies(self.device, 256 << 20)
        self.stream = self.device.new_stream()
        rng = np.random.default_rng(0)
        self.ids = rng.permutation(num_pages)[:num_blocks]
        steps = BLOCK * np.arange(num_blocks, dtype=np.uint64)
        self.slots = steps + np.uint64(self.arena.address)
        self.staged = steps + np.uint64(self.plain.address)

    def timed(self, enqueue: Callable[[], None]) -> float:
        started = time.perf_counter()
        enqueue()
        self.finish()
        return time.perf_counter() - started

    def finish(self) -> None:
        event = self.device.record(self.stream)
        while not event.done():
            pass

    def copy(self, to: int, from_: int, num_bytes: int) -> None:
        """One plain copy."""
        with self.device.current():
            self.device.driver.call("cuMemcpyAsync", to, from_, num_bytes, self.stream)

    def compare(
        self,
        name: str,
        ours: Callable[[], None],
        theirs: Callable[[], None],
        against: str,
        num_blocks: int = 0,
    ) -> Figure:
        """Medians of both, in turns; GB/s of ours."""
        num_bytes = (num_blocks or self.num_blocks) * BLOCK
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(self.rounds + 2):
            for side, work in zip(times, (ours, theirs), strict=True):
                took = self.timed(work)
                if turn >= 2:  # the first find caches and clocks cold
                    side.append(took)
        mine, other = map(statistics.median, times)
        return Figure(name, num_bytes / mine / 1e9, "GB/s", other / mine, against)


def arena_figures(at: Setup) -> list[Figure]:
    """To the arena and back, by gathering first and by the kernel alone."""
    total = at.num_blocks * BLOCK
    figures = []
    for way, suffix in ((None, ""), (Way.DIRECT, "_direct")):
        figures.append(
            at.compare(
                f"gpu_save_8b{suffix}",
                lambda way=way: at.copies.to_host(  # type: ignore[misc]
                    at.blocks, at.ids, at.host, at.slots, at.stream, way=way
                ),
                lambda: at.copy(at.arena.address, at.plain.address, total),
                "one pinned cudaMemcpyAsync, device to host",
            )
        )
        figures.append(
            at.compare(
                f"gpu_load_8b{suffix}",
                lambda way=way: at.copies.from_host(  # type: ignore[misc]
                    at.blocks, at.ids, at.host, at.slots, at.stream, way=way
                ),
                lambda: at.copy(at.plain.address, at.arena.address, total),
                "one pinned cudaMemcpyAsync, host to device",
            )
        )
    return figures


def gather_figure(at: Setup) -> list[Figure]:
    half = at.pages.address + at.num_blocks * BLOCK
    return [
        at.compare(
            "gpu_gather_8b",
            lambda: at.device.gather(at.blocks.prepared, at.ids, at.staged, at.stream),
            lambda: at.copy(at.plain.address, half, at.num_blocks * BLOCK),
            "one device-to-device cudaMemcpyAsync",
        )
    ]


def check_bytes(at: Setup) -> None:
    """What is timed is right: pages that were saved, wiped and loaded are what they were.

    Raises:
        SystemExit: they are not.
    """
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, at.pages.num_bytes, dtype=np.uint8)
    at.device.write(at.pages.address, data)
    at.copies.to_host(at.blocks, at.ids, at.host, at.slots, at.stream)
    at.finish()
    shape = (SPEC.num_layers, 2, 2 * at.num_blocks, BLOCK // (2 * SPEC.num_layers))
    want = data.reshape(shape)[:, :, at.ids].transpose(2, 0, 1, 3).reshape(at.num_blocks, -1)
    if not np.array_equal(at.arena.array.reshape(at.num_blocks, -1), want):
        raise SystemExit("the arena has other bytes than the pages")
    at.device.write(at.pages.address, np.zeros_like(data))
    at.copies.from_host(at.blocks, at.ids, at.host, at.slots, at.stream)
    at.finish()
    back = at.device.read(at.pages.address, at.pages.num_bytes).reshape(shape)[:, :, at.ids]
    if not np.array_equal(back, data.reshape(shape)[:, :, at.ids]):
        raise SystemExit("the pages have other bytes than the arena")


def ipc_figure(at: Setup) -> list[Figure]:
    """Blocks of another process's pool, read by CUDA IPC: one after the other, and here and there.

    Many, since a GPU copies 256 MiB in the time of some calls.
    """
    count = 8 * at.num_blocks
    child = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(count * BLOCK), "--fake", at.library],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    target, source = (at.device.allocate(count * BLOCK) for _ in range(2))
    try:
        line = child.stdout.readline()
        if not line:
            raise SystemExit("the other process could not share its memory")
        peer = EndpointInfo.decode(base64.b64decode(line))
        settings = TransportSettings(movers=("cuda",), cuda_library=at.library)
        with Endpoint(settings) as ours, ours.connect(peer, timeout=10.0) as link:
            offsets = BLOCK * np.arange(count, dtype=np.uint64)
            region = peer.regions[0].region_id

            def read(places: Any) -> None:
                batch = Batch(offsets + np.uint64(target.address), places, BLOCK)
                if link.read(region, batch, timeout=10.0).any():
                    raise SystemExit("a read of the other process's memory failed")

            def plain() -> None:
                at.copy(target.address, source.address, count * BLOCK)

            mixed = np.random.default_rng(0).permutation(offsets)
            against = "one device-to-device cudaMemcpyAsync"
            return [
                at.compare("cuda_ipc_read", lambda: read(offsets), plain, against, count),
                at.compare("cuda_ipc_read_scattered", lambda: read(mixed), plain, against, count),
            ]
    finally:
        child.stdin.close()
        child.wait(30)
        target.close()
        source.close()


def serve(library: str, num_bytes: int) -> None:
    """The other process: a region, until its input ends."""
    driver = Driver(library) if library else Driver()
    device = CudaDevice(driver=driver)
    memory = device.allocate(num_bytes)
    with Endpoint(TransportSettings(movers=("cuda",), cuda_library=library)) as ours:
        ours.register((memory.address, num_bytes))
        print(base64.b64encode(ours.info().encode()).decode(), flush=True)
        sys.stdin.read()


def overlap_figure(at: Setup) -> list[Figure]:
    """Matrix products alone, and beside saves: above 0.9 the copies cost them next to nothing."""
    try:
        import torch
    except ImportError:
        return [Figure.absent("gpu_compute_beside_save", "torch is not installed")]
    if not torch.cuda.is_available():
        return [Figure.absent("gpu_compute_beside_save", "torch sees no GPU")]
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    b = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")

    def products(beside: bool) -> float:
        torch.cuda.synchronize()
        at.finish()
        started = time.perf_counter()
        for _ in range(8):
            if beside:
                at.copies.to_host(at.blocks, at.ids, at.host, at.slots, at.stream)
            a @ b
        torch.cuda.current_stream().synchronize()
        took = time.perf_counter() - started
        at.finish()
        return took

    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(at.rounds + 2):
        for beside in (False, True):
            took = products(beside)
            if turn >= 2:
                times[beside].append(took)
    alone, both = (statistics.median(times[beside]) for beside in (False, True))
    return [
        Figure("gpu_compute_beside_save", both * 1e3, "ms", alone / both, "the same products alone")
    ]


def measured(name: str, work: Callable[[Setup], Sequence[Figure]], at: Setup) -> list[Figure]:
    """One figure that fails does not take the others along."""
    try:
        return list(work(at))
    except (KVStoreError, RuntimeError, OSError, SystemExit) as error:
        return [Figure.absent(name, str(error))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="few blocks, few rounds")
    parser.add_argument("--fake", default="", help="a driver without a GPU, to run the code")
    parser.add_argument("--serve", type=int, default=0, help=argparse.SUPPRESS)
    chosen: Any = parser.parse_args()
    if chosen.serve:
        serve(chosen.fake, chosen.serve)
        return
    try:
        at = Setup(chosen.fake, 4 if chosen.quick else 128, 3 if chosen.quick else 15)
    except KVStoreError as error:
        raise SystemExit(f"no figures: {error}") from error
    check_bytes(at)
    works: tuple[tuple[str, Callable[[Setup], Sequence[Figure]]], ...] = (
        ("gpu_save_8b", arena_figures),
        ("gpu_gather_8b", gather_figure),
        ("cuda_ipc_read", ipc_figure),
        ("gpu_compute_beside_save", overlap_figure),
    )
    figures = [figure for name, work in works for figure in measured(name, work, at)]
    Report(figures, quick=chosen.quick).show(as_json=chosen.json)


if __name__ == "__main__":
    main()
