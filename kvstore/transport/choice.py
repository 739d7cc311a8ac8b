"""Which mover two endpoints use, and why: the outcome of their handshake."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.transport.types import EndpointInfo

MOVERS = ("shm", "ucx", "tcp")  # the order in which they are tried
GPU_MOVER = "cuda"  # of endpoints whose regions are in GPU memory, which no other mover reaches


@dataclass(frozen=True, slots=True)
class Choice:
    """A mover, whether it may be used, and the reason for either."""

    mover: str
    usable: bool
    reason: str


def boot_id() -> str:
    """The same for all processes on a host until it starts again, in containers too."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def check_movers(movers: Sequence[str]) -> tuple[str, ...]:
    """
    Raises:
        ConfigError: there is no such mover.
    """
    for name in movers:
        if name not in (*MOVERS, GPU_MOVER):
            raise ConfigError(f"movers: {name!r} is none of {', '.join(MOVERS)}")
    return tuple(movers)


def choices(
    ours: EndpointInfo, peer: EndpointInfo, allowed: Sequence[str] | None = None
) -> list[Choice]:
    """Judge each mover, in the order in which they are to be tried.

    Args:
        ours: our endpoint.
        peer: the other.
        allowed: only these, in this order, and ucx without RDMA too; None: as is best.
    """
    best = (GPU_MOVER,) if GPU_MOVER in ours.movers else MOVERS
    names = best if allowed is None else check_movers(allowed)
    return [_judge(name, ours, peer, allowed is not None) for name in names]


def _judge(name: str, ours: EndpointInfo, peer: EndpointInfo, is_asked_for: bool) -> Choice:
    for whose, info in (("our", ours), ("the peer's", peer)):
        if name not in info.movers:
            return Choice(name, False, f"not of {whose} endpoint")
    if name == "shm":
        return _judge_shm(ours, peer)
    if name == GPU_MOVER:
        return _judge_cuda(ours, peer)
    if name == "ucx":
        return _judge_ucx(ours, peer, is_asked_for)
    return Choice(name, True, "it always works")


def _judge_ucx(ours: EndpointInfo, peer: EndpointInfo, is_asked_for: bool) -> Choice:
    if ours.has_rdma and peer.has_rdma:
        return Choice("ucx", True, "both have RDMA")
    if is_asked_for:
        return Choice("ucx", True, "asked for; without RDMA")
    whose = "the peer has" if ours.has_rdma else "we have"
    return Choice("ucx", False, f"{whose} no RDMA, and our own TCP is as fast as UCX's")


def _judge_cuda(ours: EndpointInfo, peer: EndpointInfo) -> Choice:
    if ours.boot_id != peer.boot_id:
        return Choice(GPU_MOVER, False, "another host")
    if ours.pid_namespace != peer.pid_namespace:
        return Choice(GPU_MOVER, False, "another container: its processes are not visible here")
    return Choice(GPU_MOVER, True, "same host")


def _judge_shm(ours: EndpointInfo, peer: EndpointInfo) -> Choice:
    if ours.epoch == peer.epoch or (ours.pid == peer.pid and _are_neighbours(ours, peer)):
        return Choice("shm", True, "same process")
    if ours.boot_id != peer.boot_id:
        return Choice("shm", False, "another host")
    if ours.pid_namespace != peer.pid_namespace:
        return Choice("shm", False, "another container: its processes are not visible here")
    for region in peer.regions:
        if "shm" not in region.keys:
            return Choice("shm", False, f"region {region.region_id} is no shared memory")
    return Choice("shm", True, "same host")


def _are_neighbours(ours: EndpointInfo, peer: EndpointInfo) -> bool:
    return ours.boot_id == peer.boot_id and ours.pid_namespace == peer.pid_namespace
