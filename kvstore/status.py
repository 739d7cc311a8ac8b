"""What a daemon says of itself: the shapes that `kvstore status`, `top`, the status page and tests
share. All of it is plain JSON.
"""

from __future__ import annotations

from typing import Literal, TypedDict

State = Literal["serving", "draining", "adopting"]


class TierStatus(TypedDict):
    tier: str
    used_bytes: int
    capacity_bytes: int
    blocks: int


class Rates(TypedDict):
    """Over the last ten seconds."""

    hit_ratio: float  # blocks found / blocks asked for; 0 when none were
    load_bytes_per_second: float
    store_bytes_per_second: float
    requests_per_second: float


class HotPrefix(TypedDict):
    namespace: int
    first_block: str  # hex
    uses: int
    blocks: int  # of the longest chain seen


class TenantStatus(TypedDict):
    name: str
    cpu_used_bytes: int
    cpu_quota_bytes: int  # 0: no bound
    ssd_used_bytes: int
    ssd_quota_bytes: int
    blocks: int


class NamespaceStatus(TypedDict):
    number: int
    tenant: str
    model: str
    block_bytes: int
    digest: str  # hex


class ClientStatus(TypedDict):
    label: str
    pid: int
    uid: int
    address: str
    connections: int
    requests: int
    bytes_in: int
    bytes_out: int
    connected_seconds: float


class LoggedError(TypedDict):
    time: float  # Unix seconds
    level: str
    message: str


class Scrubbed(TypedDict):
    """Answer to AdminVerify."""

    checked_bytes: int
    removed_blocks: int  # damaged
    whole: bool  # everything in DRAM was checked in the time given


class HolderStatus(TypedDict):
    """Another daemon, from which blocks were fetched."""

    address: str
    is_away: bool  # it failed lately
    sessions: int
    mover: str  # "": none was needed yet; "frames": none serves both ends
    reason: str  # for the mover
    bytes_per_second: float  # as measured lately


class PeersStatus(TypedDict):
    movers: list[str]  # that peers may use
    unavailable: dict[str, str]  # movers that do not work here, and why
    address: str  # where the tcp mover listens
    holders: list[HolderStatus]


class Status(TypedDict):
    version: str
    epoch: str
    pid: int
    uptime_seconds: float
    state: State
    addresses: list[str]
    adopted: dict[str, float] | None  # what the last start took over; None: it began empty
    tiers: list[TierStatus]
    metrics: dict[str, float]
    rates: Rates
    # Unix seconds, hit ratio, load and store bytes a second, cpu and ssd bytes used; oldest first.
    history: list[list[float]]
    hot_prefixes: list[HotPrefix]
    tenants: list[TenantStatus]
    namespaces: list[NamespaceStatus]
    clients: list[ClientStatus]
    leases: int
    reservations: int
    quarantined_slots: int
    peers: PeersStatus | None  # None: there is no peer_token
    recent_errors: list[LoggedError]
