"""`kvstore.open`, `kvstore.connect` and `kvstore.share`.

They import what they need when they are called, so that `import kvstore` does not load LMDB, the
wire protocol and sockets for a caller who only hashes or only connects.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.block import BlockSpec, Namespace
from kvstore.certificates import TlsFiles
from kvstore.config import StoreConfig, load_config
from kvstore.errors import ConfigError
from kvstore.store import Store

if TYPE_CHECKING:
    from kvstore.daemon.server import Server
    from kvstore.tiers.local import Tiers


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
        if chosen.peer_token:
            _add_peers(tiers, chosen)
        control = LocalControl(tiers, name, owns_tiers=True)
    except BaseException:
        tiers.close()
        raise
    return Store(control)


def _add_peers(tiers: Tiers, config: StoreConfig) -> None:
    import secrets

    from kvstore.auth import read_secret
    from kvstore.peers import LatePeers

    secret = read_secret(config.peer_token, "peer_token")
    tiers.fetches = LatePeers(tiers, secret, epoch=secrets.token_bytes(16))


def connect(
    address: str,
    namespace: Namespace | BlockSpec | str,
    *,
    spec: BlockSpec | None = None,
    timeout: float = 1.0,
    token: str | Path | None = None,
    tenant: str = "",
    required: bool = True,
    tls: TlsFiles | None = None,
) -> Store:
    """Connect to the store that a daemon keeps, or that another process shares.

    Errors are for now, when somebody reads them: once connected, a daemon that dies or hangs means
    misses and refused puts until it is back, not exceptions in an engine's step. With
    `required=False` so does one that does not answer now. If what answers one day refuses us, that
    is logged, and goes on to mean misses.

    Args:
        address: "unix:/path/to.sock", "tcp:host:port", or "tls:host:port".
        namespace, spec: as for `kvstore.open`.
        timeout: seconds that the daemon has to answer a call, on top of what the call itself asks
            it to wait for.
        token: the tenant's secret, or the `Path` of a file with mode 0600 that holds it.
        tenant: whose blocks these are, where the daemon knows tenants.
        required: whether the daemon must be there now.
        tls: whom to trust, and our own certificate; for "tls:host:port" only.

    Raises:
        PeerUnavailableError, DeadlineExceededError: nobody listens or answers there, and that is
            required.
        IncompatibleError: whoever does speaks another protocol or version, or does not know our
            secret.
        ConfigError: an argument is wrong, blocks of this size do not fit the daemon's arena, or the
            daemon refuses tenant or secret.
    """
    from kvstore.client import RemoteControl, Target

    if not 0 < timeout < float("inf"):
        raise ConfigError(f"timeout: {timeout} is no number of seconds above 0")
    name = Namespace.of(namespace, spec)
    target = Target.of(address, name, tenant, token, tls)
    control = RemoteControl(target, timeout, required=required)
    return Store(control, call_seconds=timeout)


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
    from kvstore.daemon.server import share_tiers
    from kvstore.tiers.local import LocalControl

    control = store.control
    if not isinstance(control, LocalControl):
        raise ConfigError("store: only an embedded store can be shared")
    return share_tiers(control.tiers, address)
