"""Which releases of the engines these adapters were tested with; said at start."""

from __future__ import annotations

import logging
import pkgutil
from importlib import metadata

from kvstore import IncompatibleError

logger = logging.getLogger(__name__)

# First and last release, both tested. Engines change what connectors use in any release.
TESTED = {"nixl": ("1.5.1", "1.5.1"), "sglang": ("0.5.23", "0.5.23"), "vllm": ("0.32.0", "0.32.0")}

# What the vLLM adapter is built on, and older releases lack.
_VLLM_NEEDS = {
    "vllm.distributed.kv_transfer.kv_connector.v1.base": (
        "KVConnectorTransferResults",
        "KVConnectorWorkerMetadata",
        "SupportsHMA",
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1": (
        "bind_kv_cache_manager",
        "get_loaded_kv_cache_group_ids",
        "get_transfer_results",
        "has_pending_push_work",
        "on_new_request",
    ),
    "vllm.v1.core.block_pool.BlockPool": ("free_blocks", "touch"),
    "vllm.v1.core.kv_cache_manager.KVCacheManager": ("get_blocks",),
    "vllm.v1.core.kv_cache_utils": ("maybe_convert_block_hash", "resolve_kv_cache_block_sizes"),
    "vllm.v1.kv_cache_interface": ("get_kv_cache_spec_kind", "group_kernel_blocks"),
    "vllm.v1.metrics.cache_hit_source": ("CacheHitSource",),
}


def check_vllm() -> None:
    """Warn about a release of vLLM that was not tested.

    Raises:
        IncompatibleError: it lacks what the adapter is built on.
    """
    try:
        import vllm
    except ImportError:
        return  # whoever needs it will say so
    version = str(getattr(vllm, "__version__", ""))
    check_release("vllm", version)
    for module, names in _VLLM_NEEDS.items():
        try:
            found = pkgutil.resolve_name(module)
        except (ImportError, AttributeError) as error:
            raise _too_other(version, module) from error
        for name in names:
            if not hasattr(found, name):
                raise _too_other(version, f"{module}.{name}")


def _too_other(version: str, what: str) -> IncompatibleError:
    first, last = TESTED["vllm"]
    return IncompatibleError(
        f"vllm {version} has no {what}: this kvstore works with vllm {first} to {last}"
    )


def check_release(engine: str, found: str = "") -> None:
    """Warn when a release of `engine` is none that was tested. It may well work.

    Args:
        found: its version; default: that of the installed package of its name.
    """
    first, last = TESTED[engine]
    try:
        found = found or metadata.version(engine)
    except metadata.PackageNotFoundError:
        return  # it is there, from a source tree without a version
    if not _release(first) <= _release(found) <= _release(last):
        tested = first if first == last else f"{first} to {last}"
        logger.warning(
            "%s %s: kvstore was tested with %s %s; if something is wrong, look here first",
            engine,
            found,
            engine,
            tested,
        )


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers: 0.5.23.post1 and 0.5.23+cpu are 0.5.23."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
