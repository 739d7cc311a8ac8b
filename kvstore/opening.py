"""`kvstore.open`, `kvstore.connect` and `kvstore.share`.

They import what they need when they are called, so that `import kvstore` does not load LMDB, the
wire protocol and sockets for a caller who only hashes or only connects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvstore.block import BlockSpec, Namespace
from kvstore.config import StoreConfig, load_config
from kvstore.control import Control
from kvstore.errors import ConfigError
from kvstore.store import Store

if TYPE_CHECKING:
    from kvstore.daemon.server1 import Server


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
    from kvstore.tiers.local import LocalControl, Tiers

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


def store_of(control: Control, config: StoreConfig) -> Store:
    """Return the store of a control in this process."""
    return Store(
        control,
        verify_always=config.verify == "always",
        threads=config.threads,
        lease_seconds=config.lease_seconds,
    )


def connect(
    address: str, namespace: Namespace | BlockSpec | str, *, spec: BlockSpec | None = None
) -> Store:
    """Connect to a store that another process of this host shares.

    Args:
        address: "unix:/path/to.sock", as given to `kvstore.share`.
        namespace, spec: as for `kvstore.open`.

    Raises:
        PeerUnavailableError: nobody listens there.
        IncompatibleError: whoever listens there speaks another protocol or version.
        ConfigError: the address is wrong, or blocks of this size do not fit the daemon's arena.
    """
    from kvstore.client import RemoteControl

    control = RemoteControl(address, Namespace.of(namespace, spec))
    welcome = control.welcome
    return Store(
        control,
        verify_always=welcome.verify_always,
        threads=welcome.threads,
        lease_seconds=welcome.lease_seconds,
    )


def share(store: Store, address: str) -> Server:
    """Serve an embedded store's tiers to other processes of this host and user.

    Args:
        store: from `kvstore.open`; it must stay open for as long as the server runs.
        address: "unix:/path/to.sock".

    Returns:
        The running server; close it, or use it as a context manager.

    Raises:
        ConfigError: the store is not an embedded one, or the address is wrong.
        InUseError: another server listens there.
    """
    from kvstore.daemon.server1 import Server
    from kvstore.tiers.local import LocalControl

    control = store.control
    if not isinstance(control, LocalControl):
        raise ConfigError("store: only an embedded store can be shared")
    return Server(control.tiers, address)
