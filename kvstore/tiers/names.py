"""Names that outlive a process: of tenants, and of namespaces in an ssd directory or an arena.

Numbers of tenants and namespaces are given anew by every process. What is stored is the tenant's
name with the namespace's description. The default tenant's name is "", and is not written, so a
directory of version 0.1.0 holds blocks of the default tenant. Version 0.1.0 refuses a directory
with namespaces of other tenants, since it does not know the description's "tenant".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvstore.block import Namespace
from kvstore.errors import ConfigError, IncompatibleError, KVStoreError

METADATA_VERSION = 1
_TENANT = "tenant"


@dataclass(frozen=True)
class Tenant:
    """Who shares a quota and sees no namespace of others. Quotas in bytes, 0 for none."""

    name: str
    cpu_quota: int = 0
    ssd_quota: int = 0

    def __post_init__(self) -> None:
        if not self.name or len(self.name.encode()) > 255:
            raise ConfigError(f"tenants: {self.name[:40]!r} is not a name of 1 to 255 bytes")
        for name in ("cpu_quota", "ssd_quota"):
            if getattr(self, name) < 0:
                raise ConfigError(f"tenants.{self.name}.{name}: is negative")


def stored_key(tenant: str, namespace: Namespace) -> bytes:
    """Return 32 bytes that stand for a tenant's namespace in an ssd directory."""
    if not tenant:
        return namespace.digest
    name = tenant.encode()
    return hashlib.sha256(b"kvstore tenant\0%d\0" % len(name) + name + namespace.digest).digest()


def describe_stored(tenant: str, namespace: Namespace) -> dict[str, Any]:
    described = namespace.describe()
    return {_TENANT: tenant, **described} if tenant else described


def parse_stored(described: Any) -> tuple[str, Namespace]:
    """Return tenant and namespace of a description.

    Raises:
        IncompatibleError, ConfigError: it is none that `describe_stored` of this version gives.
    """
    if not isinstance(described, dict):
        raise IncompatibleError("a namespace description is not an object")
    tenant = described.get(_TENANT, "")
    if not isinstance(tenant, str) or (_TENANT in described and not tenant):
        raise IncompatibleError(f"a namespace description has the tenant {tenant!r}")
    rest = {name: value for name, value in described.items() if name != _TENANT}
    return tenant, Namespace.from_description(rest)


def pack_metadata(namespaces: Iterable[tuple[int, str, Namespace]]) -> bytes:
    """Return what an arena says of its namespaces: number, tenant's name, namespace."""
    rows = [[number, describe_stored(tenant, name)] for number, tenant, name in namespaces]
    body = {"version": METADATA_VERSION, "namespaces": rows}
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def unpack_metadata(data: bytes) -> list[tuple[int, str, Namespace]]:
    """Return what `pack_metadata` was given; nothing of an arena that has no metadata.

    Raises:
        IncompatibleError: it is of another version, or damaged.
    """
    if not data:
        return []
    try:
        body = json.loads(data)
        if body["version"] != METADATA_VERSION:
            raise IncompatibleError(f"version {body['version']!r}")
        rows = [(int(number), *parse_stored(described)) for number, described in body["namespaces"]]
    except (ValueError, TypeError, LookupError, RecursionError, KVStoreError) as error:
        raise IncompatibleError(f"arena: its metadata cannot be read: {error}") from error
    keys = {stored_key(tenant, namespace) for _, tenant, namespace in rows}
    if min(len(keys), len({number for number, *_ in rows})) < len(rows):
        raise IncompatibleError("arena: its metadata names namespaces twice")
    return sorted(rows, key=lambda row: row[0])
