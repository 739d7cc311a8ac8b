"""ClusterSettings: which workers there are, and how KV gets from one to the other."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from kvstore import ConfigError

from .messages import HandoffSetup, ModelSource
from .scheduler import WorkerSettings
from .worker_handle import Role


class Mode(enum.Enum):
    COLOCATED = "colocated"
    PD = "pd"
    PD_CACHE = "pd+cache"


@dataclass(frozen=True)
class ClusterSettings:
    """Colocated, as many workers run as with PD.

    `address` is a daemon's; without one, `store` are settings of `kvstore.open`. `revision` sets
    this cluster's blocks apart from those of the same model that others put there.

    handoff: how a prompt's KV gets from a prefill to a decode worker: through the "store", or from
        pool to pool by "push" or "pull"; then only pd+cache has a store, for the prefill workers.
    transport: of a hand-off: "shm", "tcp", "ucx", or "auto".
    hosts: 2: prefill and decode workers in a network namespace each, joined by a cable.
    codec: encodes a hand-off's KV on the wire: "int8" or "fp8"; tokens may differ then.
    handoff_timeout_s: a peer that gives no sign for so long is given up.
    """

    mode: Mode
    model: ModelSource = field(default_factory=ModelSource)
    prefill_workers: int = 1
    decode_workers: int = 1
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    store: dict[str, str] = field(default_factory=lambda: {"cpu": "256MiB"})
    address: str = ""
    revision: str = ""
    layerwise: bool = False
    handoff: str = "store"
    transport: str = "auto"
    hosts: int = 1
    codec: str = "none"
    handoff_timeout_s: float = 2.0
    start_timeout_s: float = 120.0
    request_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for name in ("prefill_workers", "decode_workers"):
            if not 1 <= getattr(self, name) <= 64:
                raise ConfigError(f"{name}: {getattr(self, name)} is not between 1 and 64")
        if self.hosts not in (1, 2):
            raise ConfigError(f"hosts: {self.hosts} is not 1 or 2")
        if self.handoff != "store":
            if self.mode is Mode.COLOCATED:
                raise ConfigError("handoff: colocated workers have nothing to hand off")
            self.handoff_setup("127.0.0.1")
        elif self.hosts == 2:
            raise ConfigError("hosts: 2 only with a hand-off by push or pull; the store is of one")

    def roles(self) -> list[Role]:
        if self.mode is Mode.COLOCATED:
            return [Role.BOTH] * (self.prefill_workers + self.decode_workers)
        return [Role.PREFILL] * self.prefill_workers + [Role.DECODE] * self.decode_workers

    @property
    def hands_off(self) -> bool:
        return self.handoff != "store"

    @property
    def has_store(self) -> bool:
        return self.mode is Mode.PD_CACHE or (self.mode is Mode.PD and not self.hands_off)

    def handoff_setup(self, listen: str) -> HandoffSetup | None:
        if not self.hands_off:
            return None
        return HandoffSetup(
            direction=self.handoff,
            transport=self.transport,
            listen=listen,
            codec=self.codec,
            timeout_s=self.handoff_timeout_s,
            wait_s=5 * self.handoff_timeout_s,
            lease_s=self.request_timeout_s,
        )
