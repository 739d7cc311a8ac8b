"""`kvstore serve` and `kvstore restart`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kvstore import wire
from kvstore.config import DaemonConfig, TenantConfig, load_daemon_config
from kvstore.config_sources import Setting, help_of, token_from_environment
from kvstore.errors import (
    ConfigError,
    DeadlineExceededError,
    KVStoreError,
    PeerUnavailableError,
)
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

log = logging.getLogger(__name__)

_ASK_AGAIN_SECONDS = 0.02


def _settings() -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(DaemonConfig) if field.name != "tenants"]


def _with_setting_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for each setting of the daemon. They arrive as text: the loader that
    reads a file and the environment checks them too."""
    signature = inspect.signature(command, eval_str=True)
    kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    flags = []
    for field in _settings():
        flag = "--" + field.name.replace("_", "-")
        is_switch = isinstance(field.default, bool)
        kind: Any = bool if is_switch else str
        names = [f"{flag}/--no-{flag[2:]}"] if is_switch else [flag]
        shown = "none" if field.default == "" else field.default
        note = typer.Option(*names, help=f"{help_of(field)} [default: {shown}]", show_default=False)
        flags.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, note],
            )
        )
    command.__signature__ = signature.replace(parameters=[*kept, *flags])  # type: ignore[attr-defined]
    command.__annotations__ = {
        **command.__annotations__,
        **{flag.name: flag.annotation for flag in flags},
    }
    return command


@_with_setting_flags
def serve(
    *,
    config: ConfigOption = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the settings and where they are from.")
    ] = False,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Fail unless there is DRAM content to take over.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Drop DRAM content that was kept.")
    ] = False,
    **flags: Any,
) -> None:
    """Run the daemon: one cache for all engines of this host.

    DRAM content of a daemon that died, or was restarted, is taken over where the settings fit.
    """
    settings, found = load_daemon_config(config, **flags)
    if print_config:
        sys.stdout.write(config_text(settings, found))
        return
    if adopt and fresh:
        raise ConfigError("adopt: contradicts --fresh")
    from kvstore.daemon.logs import set_up
    from kvstore.daemon.service import Service

    set_up(settings.log_level, settings.log_format)
    service = Service(
        settings,
        adopt="must" if adopt else "never" if fresh else "auto",
        environment_token=token_from_environment(),
    )
    said = f"kvstored serves {', '.join(service.addresses)}"
    log.info("%s", said)
    sys.stdout.write(said + "\n")
    sys.stdout.flush()
    service.run()


def config_text(config: DaemonConfig, found: Mapping[str, Setting]) -> str:
    """Return a configuration as TOML, with where each value came from."""
    lines = []
    for field in _settings():
        origin = found[field.name].origin if field.name in found else "default"
        lines.append(f"{field.name} = {_toml(getattr(config, field.name))}  # {origin}")
    for name, tenant in config.tenants.items():
        lines += ["", f'[tenants."{name}"]  # {found["tenants"].origin}']
        lines += [
            f"{field.name} = {_toml(getattr(tenant, field.name))}"
            for field in dataclasses.fields(TenantConfig)
        ]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    # What JSON escapes, TOML's basic strings do in the same way; DEL alone may stand in JSON only.
    return json.dumps(value).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)


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
        except (PeerUnavailableError, DeadlineExceededError) as error:
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
