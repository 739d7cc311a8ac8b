"""What SGLang calls in each of its processes, by the entry point `sglang.srt.plugins`.

It makes `--disaggregation-transfer-backend kvstore` known, and changes nothing for whoever does not
ask for it. To SGLang that name then means `mooncake`, the control plane of which is kept, with
KVStoreTransfer in the place of the class that moves the bytes, and two that let a decode server
receive into host memory. SGLang does the same for its own
`mooncake_tcp`: the name becomes `mooncake`, and a variable tells the processes that it starts.
"""

from __future__ import annotations

import functools
from typing import Any

from kvstore.config_sources import choose_sglang_transfer, is_sglang_transfer_chosen

NAME = "kvstore"
_STANDS_FOR = "mooncake"
_ARGUMENTS_RESOLVED = "sglang.srt.server_args.ServerArgs.resolve_once"
_TRANSFER = (
    "sglang.srt.distributed.device_communicators.mooncake_transfer_engine.MooncakeTransferEngine"
)
_MANAGER = "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager"
_RECEIVER = "sglang.srt.disaggregation.mooncake.conn.MooncakeKVReceiver"


def register() -> None:
    """Hook into SGLang. May be called again."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if NAME not in choices.DISAGG_TRANSFER_BACKEND_CHOICES:
        choices.add_disagg_transfer_backend_choices([NAME])
        HookRegistry.register(_ARGUMENTS_RESOLVED, _choose, HookType.BEFORE)
    if is_sglang_transfer_chosen():
        _replace()


def _choose(arguments: Any) -> None:
    """Before anything looks at the arguments of a server."""
    if arguments.disaggregation_transfer_backend != NAME:
        return
    arguments.disaggregation_transfer_backend = _STANDS_FOR
    choose_sglang_transfer()
    _replace()


@functools.cache
def _replace() -> None:
    """In the processes that move KV; and in their parent, which costs little."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from kvstore_adapters.sglang.host_receive import HostReceiveManager, HostReceiver
    from kvstore_adapters.sglang.transfer import KVStoreTransfer

    HookRegistry.register(_TRANSFER, KVStoreTransfer, HookType.REPLACE)
    HookRegistry.register(_MANAGER, HostReceiveManager, HookType.REPLACE)
    HookRegistry.register(_RECEIVER, HostReceiver, HookType.REPLACE)
    HookRegistry.apply_hooks()
