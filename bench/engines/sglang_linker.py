"""How long does KVStoreLinker hold SGLang's scheduler, and how much of a load hides behind the
forward pass?

    .venv-sglang/bin/python bench/engines/sglang_linker.py [--json | --markdown] [--quick]

No engine: the linker over a real device pool of SGLang in host memory, and a daemon. Lookups are
timed as the scheduler sees them, while the linker's own threads pin what was found; against them
stand asking the daemon on the spot and SGLang's hashing of the same pages. The forward pass is a
pause for each layer as long as loading that layer takes, as on a GPU, which needs no core of ours.
Figures are medians. Where there is no GPU, put tests/adapters/sglang/stubs on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvstore.bench.report import Figure, Report
from kvstore.bench.serving import PrivateDaemon

PAGE_TOKENS, LAYERS, HEADS, HEAD_DIM = 16, 28, 2, 128
WAIT_S = 60.0


@contextmanager
def linked(address: str, num_pages: int) -> Iterator[Any]:
    """A linker over a pool of so many pages."""
    import torch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    from kvstore_adapters.sglang.linker import KVStoreLinker

    arguments = ServerArgs(model_path="dummy", page_size=PAGE_TOKENS, device="cpu")
    set_global_server_args_for_scheduler(arguments)
    pool = MHATokenToKVPool(
        size=num_pages * PAGE_TOKENS,
        page_size=PAGE_TOKENS,
        dtype=torch.bfloat16,
        head_num=HEADS,
        head_dim=HEAD_DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    params = SimpleNamespace(
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        page_size=PAGE_TOKENS,
        sidecar_draft_device_pools=(),
        mtp_draft_device_pools=(),
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
    )
    with get_parallel().override(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1):
        linker = KVStoreLinker(
            arguments,
            params,
            components={ComponentType.FULL},
            extra_config={"address": address, "model": "bench", "lookup_wait": 1.0},
        )
        try:
            yield linker
        finally:
            linker.close()


class Bench:
    """A linker whose pool and whose daemon have the pages `keys`."""

    def __init__(self, linker: Any, num_pages: int) -> None:
        self._linker = linker
        self.tokens = array("q", range(num_pages * PAGE_TOKENS))
        self.keys = self.hash(num_pages)
        self._count = 0
        linker.offload([self._transfer(num_pages)])
        give_up = time.monotonic() + WAIT_S
        while not linker.num_completed_offloads():
            if time.monotonic() > give_up:
                raise SystemExit("the pages were not stored")
            time.sleep(0.001)
        if not linker.pop_completed_offload():
            raise SystemExit("the daemon refused the pages")

    def hash(self, num_pages: int) -> list[str]:
        from sglang.srt.mem_cache.radix_cache import RadixKey
        from sglang.srt.mem_cache.utils import get_storage_hash_str

        key = RadixKey(self.tokens[: num_pages * PAGE_TOKENS])
        return list(get_storage_hash_str(key, page_size=PAGE_TOKENS))

    def _transfer(self, num_pages: int) -> Any:
        import torch
        from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

        slots = torch.arange(PAGE_TOKENS, (num_pages + 1) * PAGE_TOKENS)
        return PoolTransfer(PoolName.KV, device_indices=slots, keys=self.keys[:num_pages])

    def ask_daemon(self, num_pages: int) -> None:
        pages = self._linker._pages["kv"]
        if pages.store.match(pages.hashes(self.keys[:num_pages])) != num_pages:
            raise SystemExit("the daemon has lost pages")

    def lookup(self, num_pages: int) -> float:
        """Seconds; the pin that it starts ends outside of them."""
        self._count += 1
        request, transfer = str(self._count), self._transfer(num_pages)
        began = time.perf_counter()
        lengths = self._linker.lookup(request, [transfer])
        seconds = time.perf_counter() - began
        if len(lengths) != num_pages:
            raise SystemExit(f"{len(lengths)} of {num_pages} pages were found")
        pin = self._linker._pins.take(request)
        pin.wait(WAIT_S)
        self._linker._pins.release(pin)
        return seconds

    def lookup_unknown(self, num_pages: int) -> float:
        """Seconds for pages that neither the index nor the daemon has: an answer of the daemon."""
        import torch
        from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

        self._count += 1
        keys = [f"{self._count:032x}{page:032x}" for page in range(num_pages)]
        slots = torch.zeros(0, dtype=torch.int64)
        transfer = PoolTransfer(PoolName.KV, device_indices=slots, keys=keys)
        began = time.perf_counter()
        lengths = self._linker.lookup(str(self._count), [transfer])
        seconds = time.perf_counter() - began
        if lengths:
            raise SystemExit("pages were found that nobody stored")
        return seconds

    def admit(self, num_pages: int) -> tuple[float, int]:
        """Seconds from the lookup to the promise, and the batch that then loads."""
        self._count += 1
        request, transfer = str(self._count), self._transfer(num_pages)
        began = time.perf_counter()
        self._linker.lookup(request, [transfer])
        is_queued = self._linker.load(request, [transfer])
        seconds = time.perf_counter() - began
        if not is_queued:
            raise SystemExit("a load was refused")
        return seconds, self._linker.start_layer_wise_loading()

    def load(self, num_pages: int, pause: float, *, is_overlapped: bool) -> float:
        """Seconds from the start of a load to the end of a forward pass over it."""
        _, batch = self.admit(num_pages)
        began = time.perf_counter()
        counter = self._linker.layer_done_counter
        counter.set_consumer(batch)
        for layer in range(LAYERS):
            counter.wait_until(layer if is_overlapped else LAYERS - 1)
            if pause:
                time.sleep(pause)
        seconds = time.perf_counter() - began
        if not self._linker.finish_layer_wise_loading(batch):
            raise SystemExit("a load failed")
        return seconds


def median(work: Callable[[], float], count: int) -> float:
    work()
    return statistics.median(work() for _ in range(count))


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def lookups(bench: Bench, num_pages: int, count: int) -> list[Figure]:
    found = 1e6 * median(lambda: bench.lookup(num_pages), count)
    asked = 1e6 * median(lambda: timed(lambda: bench.ask_daemon(num_pages)), count)
    unknown = 1e6 * median(lambda: bench.lookup_unknown(num_pages), count)
    hashed = 1e6 * median(lambda: timed(lambda: bench.hash(num_pages)), count)

    def admitted() -> float:
        seconds, batch = bench.admit(num_pages)
        bench._linker.finish_layer_wise_loading(batch)
        return seconds

    promised = 1e6 * median(admitted, min(count, 20))
    name = f"linker_{num_pages}_pages"
    return [
        Figure(f"{name}_lookup_us", found, "us", asked / found, f"the daemon: {asked:.0f} us"),
        Figure(
            f"{name}_lookup_share",
            100 * found / hashed,
            "%",
            hashed / found,
            f"SGLang's own hashing of the pages: {hashed:.0f} us",
        ),
        Figure(f"{name}_lookup_unknown_us", unknown, "us"),
        Figure(f"{name}_lookup_to_promise_us", promised, "us"),
    ]


def overlap(bench: Bench, num_pages: int, count: int) -> list[Figure]:
    alone = median(lambda: bench.load(num_pages, 0.0, is_overlapped=True), count)
    pause = alone / LAYERS
    after = median(lambda: bench.load(num_pages, pause, is_overlapped=False), count)
    layered = median(lambda: bench.load(num_pages, pause, is_overlapped=True), count)
    return [
        Figure(f"linker_{num_pages}_pages_load_ms", 1e3 * alone, "ms"),
        Figure(
            f"linker_{num_pages}_pages_load_and_forward_ms",
            1e3 * layered,
            "ms",
            after / layered,
            f"the forward pass after the whole load: {1e3 * after:.1f} ms (at best 2)",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--quick", action="store_true", help="fewer pages and repetitions")
    options = parser.parse_args()
    sizes, loaded, count = ((16, 128), 128, 20) if options.quick else ((16, 128, 512), 512, 200)
    figures: list[Figure] = []
    with (
        tempfile.TemporaryDirectory(prefix="kvstore-bench-") as directory,
        PrivateDaemon(Path(directory), cpu="512MiB") as daemon,
    ):
        daemon.start()
        with linked(daemon.address, max(sizes)) as linker:
            bench = Bench(linker, max(sizes))
            for num_pages in sizes:
                figures += lookups(bench, num_pages, count)
            figures += overlap(bench, loaded, 5)
    Report(figures, options.quick).show(as_json=options.json, as_markdown=options.markdown)


if __name__ == "__main__":
    main()
