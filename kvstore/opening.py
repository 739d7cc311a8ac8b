"""`kvstore.open`."""

from __future__ import annotations

from typing import Any

from kvstore.block import BlockSpec, Namespace
from kvstore.config import StoreConfig, load_config
from kvstore.errors import ConfigError
from kvstore.store import Store
from kvstore.tiers.local import LocalControl, Tiers


def open_store(
    namespace: Namespace | BlockSpec | str,
    *,
    spec: BlockSpec | None = None,
    config: StoreConfig | None = None,
    **settings: Any,
) -> Store:
    """Open an embedded store: in this process, no server, no configuration file.

    Args:
        namespace: what the blocks are of: a `Namespace`, or only a `BlockSpec` (a store of one
            model), or a model's name with `spec`.
        config: all settings at once.
        settings: single settings of `StoreConfig`, such as cpu="8GiB", ssd="/var/cache/kv".

    Raises:
        ConfigError: a setting is wrong, the ssd directory cannot be used.
        IncompatibleError: the ssd directory holds something else, or another version's data.
        InUseError: another process holds the ssd directory.
        OutOfSpaceError: the memory cannot be had.
    """
    name = Namespace.of(namespace, spec)
    if config is not None and settings:
        raise ConfigError(f"{min(settings)}: give config or single settings, not both")
    chosen = config if config is not None else load_config(None, None, **settings)
    tiers = Tiers(chosen, name.spec.block_bytes)
    try:
        control = LocalControl(tiers, name, owns_tiers=True)
    except BaseException:
        tiers.close()
        raise
    return store_of(control, chosen)


def store_of(control: LocalControl, config: StoreConfig) -> Store:
    return Store(
        control,
        verify_always=config.verify == "always",
        threads=config.threads,
        lease_seconds=config.lease_seconds,
    )
