"""TransportSettings: how an endpoint listens, and by what it moves bytes."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """
    Args:
        listen: host, or "host:port", on which the tcp and ucx movers listen. Beyond loopback only
            with a secret.
        movers: of "shm", "ucx", "tcp"; None: all that work here. Or "cuda" alone, for GPU memory.
        timeout: seconds after which a peer that gives no sign is given up.
        bytes_per_second: limit of what peers read from us over tcp; 0: none.
        connections: of one tcp link for large batches; 0: as many as pay.
        ucx_library: path of a libucp; "": searched for.
        ucx_tls: UCX's transports; "": RDMA where there is any, else tcp.
        ucx_devices: UCX's network devices; "": all.
        cuda_device: whose memory the cuda mover serves, as this process counts GPUs.
        cuda_library: the CUDA driver's; "": as the system has it.

    Raises:
        ConfigError: a value is wrong; the message names it.
    """

    listen: str = "127.0.0.1"
    movers: tuple[str, ...] | None = None
    timeout: float = 2.0
    bytes_per_second: int = 0
    connections: int = 0
    ucx_library: str = ""
    ucx_tls: str = ""
    ucx_devices: str = ""
    cuda_device: int = 0
    cuda_library: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= 3600:
            raise ConfigError(f"timeout: {self.timeout} is not between 0 and 3600 seconds")
        if self.movers is not None and "cuda" in self.movers and len(self.movers) > 1:
            raise ConfigError("movers: cuda serves GPU memory, the others do not: it goes alone")
        if self.bytes_per_second < 0:
            raise ConfigError(f"bytes_per_second: {self.bytes_per_second} is negative")
        if not 0 <= self.connections <= 64:
            raise ConfigError(f"connections: {self.connections} is not between 0 and 64")
