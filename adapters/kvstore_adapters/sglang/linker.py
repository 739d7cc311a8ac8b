"""KVStoreLinker: SGLang's device pools straight to kvstore, without SGLang's own host cache.

    --enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic
    --unified-cache-external-linker-config '{"linker": "KVStoreLinker",
        "linker_module_path": "kvstore_adapters.sglang.linker",
        "linker_extra_config": {"address": "unix:/run/kvstore.sock"}}'

What SGLang asks for, in its order, all on the scheduler's thread:

1. `lookup`, for each request it considers: answered from a local index in microseconds, and the
   pages are pinned in the background. Pages that the index does not know are asked for, and waited
   for no longer than `lookup_wait`.
2. `load`, when the request is admitted: the last moment to say no, and then SGLang computes the
   prefix. So this waits for the pin, looks once more whether the pages are still those, and says no
   otherwise.
3. `start_layer_wise_loading`: from here the forward pass relies on the pages. A thread copies them
   layer by layer, while the layers before are computed. What fails now aborts the request (status
   503), which is SGLang's rule: a damaged block, or a lease that ended on the way and could not be
   had again.

With several ranks they must all say the same, so only what is pinned is promised: 1. waits for the
pin, and 2. says yes. A daemon of this host that dies in between does no harm: pages stay mapped.

Thread safety: SGLang calls from one thread. The threads of ours are one that pins, one that loads,
and one that stores.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    LayerWiseLoadCounter,
    UnifiedCacheLinker,
)
from sglang.srt.utils import get_device_module

from kvstore import KVStoreError
from kvstore_adapters.compat import check_release
from kvstore_adapters.daemon_start import ensure_daemon
from kvstore_adapters.planning.notices import Notices
from kvstore_adapters.planning.shards import Shards
from kvstore_adapters.sglang import hit_policies
from kvstore_adapters.sglang.device_pages import DevicePages, Pieces
from kvstore_adapters.sglang.index import HashIndex
from kvstore_adapters.sglang.keys import Rank, namespace_of
from kvstore_adapters.sglang.linker_pools import block_of, is_alone, pool_group, rank_of
from kvstore_adapters.sglang.linker_workers import Loader, LoadJob, Move, Saver
from kvstore_adapters.sglang.pins import Pin, Pins, Wants
from kvstore_adapters.sglang.runtime import model_of, settings_of

logger = logging.getLogger(__name__)

INDEX_PAGES = 1 << 20  # about 200 bytes each
PIN_SECONDS = 30.0  # from the lookup of a request to the end of its load
PIN_WAIT_SECONDS = 0.02  # that admission waits for a pin; computing the prefix costs more
# That one request's pages may take to come from ssd while others wait for their pins; what comes
# later is in DRAM for the next lookup.
ACQUIRE_SECONDS = 0.05
EVENT_SECONDS = 0.5  # between looks at what others stored and what went
CLOSE_SECONDS = 5.0
OFFLOAD_FRACTION = 2  # half of the device pages may be on their way out, and kept meanwhile

_KV = "kv"  # SGLang's name of the main pool


class KVStoreLinker(UnifiedCacheLinker):
    """See SGLang's `UnifiedCacheLinker`; made by its `dynamic` loader.

    Raises:
        ConfigError: a setting is wrong, or the model's pages cannot be moved by a linker.
    """

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: set[Any],
        extra_config: dict[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        check_release("sglang")
        self.forward_stream = forward_stream
        self._settings = settings_of(extra_config or {})
        ensure_daemon(self._settings)
        self._group = pool_group(params, components)
        self.pools = self._group.entry_map
        self.layer_done_counter = LayerWiseLoadCounter(self._group.num_layers)
        rank = rank_of(params, self._group.rank_replicated)
        self._is_alone = is_alone()
        self._is_writer = not rank.is_replicated or rank.tp_rank == 0
        self._notices = Notices(logger)
        self._pages = self._open(rank)
        self._indexes = {name: HashIndex(INDEX_PAGES) for name in self._pages}
        self._queued: dict[str, LoadJob] = {}
        self._pins = Pins(
            self._pages,
            lease_seconds=PIN_SECONDS,
            acquire_seconds=min(ACQUIRE_SECONDS, self._settings.load_deadline),
            idle_seconds=EVENT_SECONDS,
            found=self._found,
            idle=self._take_events,
        )
        self._loader = Loader(
            self._pages,
            self.layer_done_counter,
            self._pins.release,
            lease_seconds=PIN_SECONDS,
            acquire_seconds=self._settings.load_deadline,
        )
        num_pages = min(pages.pieces.num_pages for pages in self._pages.values())
        self._saver = Saver(self._pages, self._stored, max(1, num_pages // OFFLOAD_FRACTION))

    def _open(self, rank: Rank) -> dict[str, DevicePages]:
        settings = self._settings
        model = model_of(None, settings)
        blocks = {name: block_of(entry, Pieces.of(entry)) for name, entry in self._entries()}
        self._shards = Shards(
            {
                (0, number): namespace_of(name, block, rank, model)
                for number, (name, block) in enumerate(blocks.items())
            },
            settings,
        )
        self._shards.connect_all()
        opened: dict[str, DevicePages] = {}
        for number, (name, entry) in enumerate(self._entries()):
            store = self._shards.store(0, number)
            opened[name] = DevicePages(entry, store)
            logger.info(
                "pool %s: pages of %d bytes, layout %s, namespace %s",
                name,
                blocks[name].spec.block_bytes,
                blocks[name].layout,
                store.namespace.digest.hex()[:16],
            )
        return opened

    def _entries(self) -> list[tuple[str, Any]]:
        return [(_name(pool_name), entry) for pool_name, entry in self.pools.items()]

    # --- 1. what is there

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        try:
            asked = self._group.resolve_transfers(transfers)
            return self._lookup(rid, asked, _keys_of(transfers)) if asked else []
        except Exception as error:  # noqa: BLE001  nothing of ours may stop the scheduler
            self._notices.warn("a lookup failed and counts as a miss", repr(error))
            return []

    def _lookup(self, rid: str, asked: Sequence[PoolTransfer], keys: Sequence[str]) -> list[int]:
        """Whatever the index knows, the whole prefix is asked for: the next lookup knows more."""
        lengths = self._restorable(asked, keys)
        wants = _wanted(asked, keys, lengths)
        pin = self._pins.begin(rid, _asks(asked, keys, wants), wants)
        if not lengths:
            if pin is None or not self._pins.wait(pin, self._settings.lookup_wait):
                return []
            lengths = self._restorable(asked, keys)
            wants = _wanted(asked, keys, lengths)
            pin = self._pins.begin(rid, _asks(asked, keys, wants), wants) if lengths else None
        if self._is_alone or not lengths:
            return lengths
        if pin is None or not self._pins.wait(pin, self._settings.lookup_wait):
            return []
        return _promised(pin, wants, asked)

    def _restorable(self, asked: Sequence[PoolTransfer], keys: Sequence[str]) -> list[int]:
        """The lengths of prefixes all of whose parts the indexes know, in pages."""
        num_pages = self._indexes[_KV].leading(keys) if _KV in self._indexes else len(keys)
        if all(_name(t.name) == _KV for t in asked) or not num_pages:
            return list(range(1, num_pages + 1))
        restorable = np.ones(num_pages, np.bool_)
        for transfer in asked:
            index = self._indexes[_name(transfer.name)]
            present = np.fromiter((key in index for key in keys[:num_pages]), np.bool_, num_pages)
            if _is_trailing(transfer):
                restorable &= hit_policies.trailing_pages(present, _window(transfer))
            else:
                restorable &= hit_policies.all_pages(present)
        lengths: list[int] = (np.flatnonzero(restorable) + 1).tolist()
        return lengths

    # --- 2. and 3. loading

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        try:
            return self._load(rid, transfers)
        except Exception as error:  # noqa: BLE001  nothing of ours may stop the scheduler
            self._notices.warn("a load failed", repr(error))
            return False

    def _load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        resolved = self._group.resolve_transfers(
            transfers, allow_partial=True, allow_missing_kv=True
        )
        moves = [_move(transfer) for transfer in resolved]
        pin = self._pins.take(rid)
        if pin is None and not self._is_alone:
            pin = Pin({})  # the loader pins by itself: other ranks have said yes
            pin.finish()
        if not moves or pin is None:
            return False
        if self._is_alone and not self._is_held(pin, {move.name: move.keys for move in moves}):
            return False
        self._queued[rid] = LoadJob(moves, pin)
        return True

    def _is_held(self, pin: Pin, wants: Wants) -> bool:
        """Whether the pages may be promised now; if not, the pin ends."""
        if self._pins.wait(pin, PIN_WAIT_SECONDS) and pin.holds(wants):
            return True
        if pin.is_done:
            for name, keys in wants.items():
                pinned = pin.pages.get(name)
                self._indexes[name].discard(keys[pinned.num_pages if pinned else 0 :])
        self._pins.release(pin)
        return False

    def start_layer_wise_loading(self) -> int:
        if not self._queued:
            return -1
        jobs, self._queued = list(self._queued.values()), {}
        ready = get_device_module().Event()
        ready.record()
        return self._loader.submit(jobs, ready)

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return bool(self.layer_done_counter.finish(counter_index))

    def cancel_queued_load(self, rid: str) -> bool:
        job = self._queued.pop(rid, None)
        if job is not None:
            self._pins.release(job.pin)
        return job is not None

    # --- storing

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        try:
            resolved = self._group.resolve_transfers(transfers, allow_partial=True)
            if resolved and self._is_writer:
                self._saver.submit([_move(t) for t in resolved], self.record_offload_ready())
            elif resolved:
                self._saver.skip()
        except Exception as error:  # noqa: BLE001  nothing of ours may stop the scheduler
            self._notices.warn("pages are not stored", repr(error))
            return False
        return bool(resolved)

    def num_completed_offloads(self) -> int:
        return self._saver.num_results

    def pop_completed_offload(self) -> bool:
        return self._saver.pop_result()

    # --- the index

    def _stored(self, name: str, keys: Sequence[str]) -> None:
        self._indexes[name].add(keys)

    def _found(self, name: str, keys: Sequence[str], count: int) -> None:
        index = self._indexes[name]
        index.add(keys[:count])
        index.discard(keys[count : count + 1])
        if name != _KV:
            return
        for other, pages in self._pages.items():  # windows and states have no leading pages
            if other != _KV and count:
                present = pages.store.contains(pages.hashes(keys[:count]))
                self._indexes[other].add(
                    key for key, flag in zip(keys, present, strict=False) if flag
                )

    def _take_events(self) -> None:
        """Of a daemon that is away nothing is heard; its client says that it is away."""
        for name, pages in self._pages.items():
            with contextlib.suppress(KVStoreError):
                self._indexes[name].apply(pages.store.events())

    # --- ending

    def reset(self) -> None:
        """Only SGLang's side is emptied; what is stored stays, and stays known."""
        queued, self._queued = self._queued, {}
        for job in queued.values():
            self._pins.release(job.pin)
        self._loader.join()
        self._saver.join()
        self._pins.clear()
        self.layer_done_counter.reset()

    def close(self) -> None:
        self.reset()
        self._loader.close(CLOSE_SECONDS)
        self._saver.close(CLOSE_SECONDS)
        self._pins.close(CLOSE_SECONDS)
        self._shards.close(CLOSE_SECONDS)


def _name(pool_name: Any) -> str:
    """SGLang names pools by strings that are enums, or by plain strings."""
    return str(getattr(pool_name, "value", pool_name))


def _keys_of(transfers: Sequence[PoolTransfer]) -> Sequence[str]:
    """The pages of the prefix that is asked for: those of the main pool."""
    return next((t.keys or () for t in transfers if _name(t.name) == _KV), ())


def _move(transfer: PoolTransfer) -> Move:
    """Of a resolved transfer, whose slots SGLang calls host indices."""
    return Move(_name(transfer.name), transfer.keys or (), transfer.host_indices)


def _window(transfer: PoolTransfer) -> int:
    return max(1, len(transfer.keys or ()))


def _is_trailing(transfer: PoolTransfer) -> bool:
    return bool(transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES)


def _wanted(asked: Sequence[PoolTransfer], keys: Sequence[str], lengths: Sequence[int]) -> Wants:
    """The pages of each pool that the longest of the prefixes needs; none for no prefix."""
    wants: dict[str, Sequence[str]] = {}
    for transfer in asked if lengths else ():
        end = lengths[-1]
        begin = max(0, end - _window(transfer)) if _is_trailing(transfer) else 0
        wants[_name(transfer.name)] = keys[begin:end]
    return wants


def _asks(asked: Sequence[PoolTransfer], keys: Sequence[str], wants: Wants) -> Wants:
    """All that may be there: of a pool with a window only what is wanted, because its pages are
    of use only together with a prefix of known length."""
    whole = {_name(t.name): keys for t in asked if not _is_trailing(t)}
    return {**wants, **whole}


def _promised(pin: Pin, wants: Wants, asked: Sequence[PoolTransfer]) -> list[int]:
    """The lengths of prefixes that are pinned. Where a pool has a window, only the whole one: the
    windows of shorter prefixes are not pinned."""
    whole = len(wants[_KV])
    if any(map(_is_trailing, asked)):
        return [whole] if pin.holds(wants) else []
    num_pages = min(pin.pages[name].num_pages for name in wants) if pin.asks_for(wants) else 0
    return list(range(1, min(whole, num_pages) + 1))
