"""`kvstore restart`: new code, same process, same DRAM content."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from kvstore import wire
from kvstore.errors import ConfigError, DeadlineExceededError, KVStoreError
from kvstore.ops.common import (
    ConfigOption,
    ConnectOption,
    JsonOption,
    TimeoutOption,
    TokenOption,
    failures,
    print_json,
    target,
)

_ASK_AGAIN_SECONDS = 0.02


def restart(
    connect: ConnectOption = None,
    config: ConfigOption = None,
    token_file: TokenOption = None,
    timeout: TimeoutOption = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Have the daemon start again, with its DRAM content kept; wait until it serves."""
    with failures(as_json):
        done = restart_daemon(connect, config, token_file, timeout)
        if as_json:
            print_json(done)
        else:
            typer.echo(
                f"restarted in {done['seconds']:.2f} s, process {done['pid']}; "
                f"{done['blocks_kept']} of {done['blocks_before']} blocks in DRAM kept"
            )


def restart_daemon(
    connect: str | None, config: Path | None, token_file: Path | None, timeout: float
) -> dict[str, Any]:
    """Ask for a restart and wait for the new daemon.

    Raises:
        PeerUnavailableError: there is no daemon.
        DeadlineExceededError: there was none again in `timeout` seconds.
    """
    where = target(connect, config, token_file, min(timeout, 5.0))
    began = time.monotonic()
    with where.open() as admin:
        before = _blocks(admin.status())
        asked = admin.call(wire.AdminRestart())
    while True:
        why: KVStoreError
        try:
            with where.open() as admin:
                status = admin.status()
            if status["epoch"] != asked["epoch"] and status["state"] == "serving":
                break
            why = DeadlineExceededError("it still finishes what is under way")
        except ConfigError:
            raise
        except KVStoreError as error:  # gone, or answering for the last time
            why = error
        if time.monotonic() - began > timeout:
            raise DeadlineExceededError(f"the daemon does not serve after {timeout} s: {why}")
        time.sleep(_ASK_AGAIN_SECONDS)
    return {
        "seconds": time.monotonic() - began,
        "pid": status["pid"],
        "blocks_before": before,
        "blocks_kept": int((status["adopted"] or {}).get("adopted", 0)),
        "adopted": status["adopted"],
    }


def _blocks(status: Mapping[str, Any]) -> int:
    return sum(int(tier["blocks"]) for tier in status["tiers"] if tier["tier"] == "cpu")
