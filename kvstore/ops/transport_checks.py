"""Checks of `doctor` on how bytes move between processes and hosts."""

from __future__ import annotations

from kvstore.errors import ConfigError, KVStoreError
from kvstore.ops.checks import Context, Run, Verdict, fail, ok, warn
from kvstore.ops.probes import Probes
from kvstore.transport import TransportSettings

_DEVICES_SHOWN = 6


def _settings(context: Context) -> TransportSettings:
    config = context.config
    if config is None or config.movers == "auto":
        return TransportSettings()
    return TransportSettings(movers=tuple(config.mover_names))


def check_transports(probes: Probes, context: Context) -> Verdict:
    """Which movers this machine has."""
    found = probes.movers(_settings(context))
    if isinstance(found, str):
        return fail(found, "correct `movers`, or leave it at auto")
    movers, unavailable = found
    missing = "".join(f"; not {name}: {why}" for name, why in unavailable.items())
    return ok(f"usable: {', '.join(movers)}{missing}")


def check_ucx(probes: Probes, context: Context) -> Verdict:
    """Which UCX is found, where, and with which transports and devices."""
    try:
        reports = probes.ucx_libraries("")
    except ConfigError as error:
        return fail(str(error), "correct $KVSTORE_UCX_LIB")
    if not reports:
        return ok("no libucp: needed for RDMA only")
    lines = []
    for report in reports:
        shown = [f"{transport}/{device}" for transport, device in report.transports]
        more = f" and {len(shown) - _DEVICES_SHOWN} more" if len(shown) > _DEVICES_SHOWN else ""
        said = report.problem or f"{report.version}: {', '.join(shown[:_DEVICES_SHOWN])}{more}"
        lines.append(f"{report.path} ({report.origin}) {said}")
    found = "; ".join(lines)
    if reports[0].problem:
        return warn(found, "the first is the one that is used; $KVSTORE_UCX_LIB names another")
    return ok(found)


def check_peer(probes: Probes, context: Context) -> Verdict:
    """By which mover a daemon that `--peer` names is reached, and why not by the others."""
    config, address = context.config, context.peer
    if not address:
        return ok("none named; --peer asks a daemon")
    if config is None or not config.peer_token:
        return fail(f"{address}: not asked: no peer_token is set", "set `peer_token`")
    settings = _settings(context)
    try:
        mover, detail, judged = probes.reach_peer(
            address, config.peer_token, settings, context.timeout
        )
    except KVStoreError as error:
        return fail(str(error), "see that it runs, has the same peer_token, and is not fenced off")
    why = "; ".join(f"{choice.mover}: {choice.reason}" for choice in judged)
    return ok(f"{address}: by {mover} ({detail}); {why}")


TRANSPORT_CHECKS: tuple[tuple[str, Run], ...] = (
    ("transports", check_transports),
    ("ucx", check_ucx),
    ("peer", check_peer),
)
