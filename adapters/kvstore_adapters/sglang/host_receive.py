"""Decode servers that receive KV into SGLang's host pool, from which SGLang loads it itself: what a
decode server with its KV on a GPU needs, since others cannot write there.

SGLang has this as `--disaggregation-decode-host-receive-threshold`, for transfer backends that
support it. Mooncake's connector does not; it does with the two classes here, at threshold 0, where
all KV goes by the host. The prefill server knows nothing of it: the addresses that it is told are
those of the host pool.
"""

from __future__ import annotations

import copy
import logging
import time
from typing import Any

from sglang.srt.disaggregation.base.conn import KVTransferDestination
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager, MooncakeKVReceiver
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.runtime_context import get_disagg

log = logging.getLogger(__name__)

# A batch that was begun takes less (TransferSettings.timeout), so after that nobody begins anew.
_STALE_SECONDS = 30.0


class HostReceiveManager(MooncakeKVManager):
    """Registers and announces host pools in the place of the device's where KV goes by the host."""

    supports_host_destination = True

    def __init__(self, args: Any, mode: DisaggregationMode, *rest: Any, **named: Any) -> None:
        threshold = get_disagg().disaggregation_decode_host_receive_threshold
        self.receives_on_host = mode == DisaggregationMode.DECODE and threshold < 1
        if self.receives_on_host:
            if threshold > 0:
                raise ValueError(
                    "--disaggregation-decode-host-receive-threshold: kvstore receives all KV on"
                    f" the host (0) or none (1), not from {threshold} on"
                )
            args = _on_host(args)
        super().__init__(args, mode, *rest, **named)


def _on_host(args: Any) -> Any:
    found = copy.copy(args)
    if list(args.host_kv_item_lens) != list(args.kv_item_lens):
        raise ValueError(
            "host pages are laid out as the device's are only with --hicache-mem-layout layer_first"
        )
    found.kv_data_ptrs = args.host_kv_data_ptrs
    found.kv_data_lens = args.host_kv_data_lens
    if args.state_types:
        found.state_data_ptrs = args.host_state_data_ptrs
        found.state_data_lens = args.host_state_data_lens
    return found


class HostReceiver(MooncakeKVReceiver):
    _aborted_at = 0.0

    @property
    def supports_host_destination(self) -> bool:
        return bool(self.kv_mgr.receives_on_host)

    def send_metadata(self, *arguments: Any, **named: Any) -> None:
        destination = named.pop("destination", KVTransferDestination.DEVICE)
        if (destination == KVTransferDestination.HOST) != self.kv_mgr.receives_on_host:
            # Indices of one pool are not those of the other.
            raise NotImplementedError(f"KV for the {destination} where all goes to the other")
        super().send_metadata(*arguments, **named)

    def is_abort_release_safe(self) -> bool:
        """All prefill ranks have said that they do not write any more; or one did not, long after
        the last of its batches ended, and what it may have left on the way is cut off."""
        if not self.abort_notified:
            return True
        now = time.monotonic()
        self._aborted_at = self._aborted_at or now
        if self.kv_mgr.is_abort_release_safe(self.bootstrap_room, len(self.bootstrap_infos)):
            return True
        if now - self._aborted_at < _STALE_SECONDS:
            return False
        log.warning("no word of a prefill server about request %s", self.bootstrap_room)
        return bool(self.kv_mgr.engine.drain())

    def clear(self) -> None:
        super().clear()
        if self.kv_mgr.receives_on_host:
            self.kv_mgr.clear_deferred_abort_state(self.bootstrap_room)
