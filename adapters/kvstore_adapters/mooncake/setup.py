"""What of Mooncake's settings means something to kvstore, and the store that they lead to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvstore

from .codes import INVALID_PARAMS, RPC_FAIL
from .objects import Objects

logger = logging.getLogger(__name__)

_ATTEMPTS = 10  # a daemon that has just been started listens before it answers


def _is_true(value: Any) -> bool:
    return str(value).strip().lower() in ("1", "true", "yes", "on")


@dataclass(frozen=True)
class Setup:
    """See MooncakeDistributedStore.setup."""

    master_server_addr: str
    local_hostname: str = ""
    tenant_id: str = "default"
    timeout: float = 1.0
    token_file: str = ""
    kvstore_tenant: str = ""
    require_registration: bool = True

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Setup:
        """From a dictionary of text, as LMCache gives it. The rest of it is Mooncake's."""
        address = settings.get("master_server_addr", settings.get("master_server_address", ""))
        given = {name: make(settings[name]) for name, make in _MEANT.items() if name in settings}
        return cls(str(address), **given)

    @property
    def address(self) -> str:
        text = self.master_server_addr
        return text if text.startswith(("unix:", "tcp:")) else f"tcp:{text}"

    def open(self) -> Objects | int:
        """Return the code of why not when it fails, and log the reason."""
        tenant = "" if self.tenant_id == "default" else self.tenant_id
        error: kvstore.KVStoreError
        for _ in range(_ATTEMPTS):
            try:
                return Objects(self._connect, tenant)
            except kvstore.DeadlineExceededError as late:
                error = late
            except kvstore.KVStoreError as refused:
                error = refused
                break
        logger.error("setup: master_server_addr %r: %s", self.master_server_addr, error)
        is_away = isinstance(error, kvstore.PeerUnavailableError | kvstore.DeadlineExceededError)
        return RPC_FAIL if is_away else INVALID_PARAMS

    def _connect(self, namespace: kvstore.Namespace, *, required: bool) -> kvstore.Store:
        return kvstore.connect(
            self.address,
            namespace,
            timeout=self.timeout,
            token=Path(self.token_file) if self.token_file else None,
            tenant=self.kvstore_tenant,
            required=required,
        )


_MEANT: dict[str, Callable[[Any], Any]] = {
    "local_hostname": str,
    "tenant_id": str,
    "timeout": float,
    "token_file": str,
    "kvstore_tenant": str,
    "require_registration": _is_true,
}
