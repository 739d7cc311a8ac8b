"""What a cluster opens before its workers can work: a store, and hosts to put them on."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import kvstore
from kvstore import BlockSpec, ConfigError, Namespace, Store

from .cluster_settings import ClusterSettings
from .messages import Ready

if TYPE_CHECKING:
    from kvstore.bench.two_hosts import TwoHosts


def open_store(settings: ClusterSettings, model: Ready, stack: ExitStack) -> tuple[Store, str]:
    """The store, and the address where workers find it."""
    spec = BlockSpec(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_tokens=model.block_tokens,
        dtype=model.dtype,
    )
    namespace = Namespace(model=model.model, spec=spec, revision=model.revision)
    if settings.address:
        store = kvstore.connect(settings.address, namespace)
        stack.callback(store.close)
        return store, settings.address
    chosen: dict[str, Any] = dict(settings.store)
    store = kvstore.open(namespace, **chosen)
    stack.callback(store.close)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-"))
    address = f"unix:{folder}/store.sock"
    stack.enter_context(kvstore.share(store, address))
    return store, address


def open_hosts(settings: ClusterSettings, stack: ExitStack) -> TwoHosts | None:
    """Prefill workers run on the first, decode workers on the second; None: beside the router.

    Raises:
        ConfigError: this machine allows no network namespaces; it says what is missing.
    """
    if settings.hosts == 1:
        return None
    from kvstore.bench.two_hosts import HostsUnavailableError, TwoHosts

    try:
        return stack.enter_context(TwoHosts())
    except HostsUnavailableError as error:
        raise ConfigError(f"hosts: {error}") from error
