"""`open` and `connect`: the two ways to a Store."""

from __future__ import annotations

from typing import Any

from kvstore.block import BlockSpec, Namespace
from kvstore.config import StoreConfig, load_config
from kvstore.store import Store
from kvstore.tiers.local import LocalControl, Tiers


def as_namespace(namespace: Namespace | BlockSpec | str, spec: BlockSpec | None) -> Namespace:
    if isinstance(namespace, Namespace):
        return namespace
    if isinstance(namespace, BlockSpec):
        return Namespace(model="unnamed", spec=namespace)
    if spec is None:
        raise TypeError("a model's name alone does not say its blocks: give spec=BlockSpec(...)")
    return Namespace(model=namespace, spec=spec)


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
    name = as_namespace(namespace, spec)
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
