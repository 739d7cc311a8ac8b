"""`kvstore serve`: run the daemon."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from kvstore.config import DaemonConfig, TenantConfig, load_daemon_config
from kvstore.config_sources import Setting, help_of, token_from_environment
from kvstore.errors import ConfigError
from kvstore.ops.common import ConfigOption

log = logging.getLogger(__name__)

_METAVARS = {"int | str": "BYTES", "int": "N", "float": "SECONDS"}  # by a field's annotation


def _settings() -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(DaemonConfig) if field.name != "tenants"]


def _help(field: dataclasses.Field[Any]) -> str:
    """What a setting is, and its default where that is a value."""
    if field.default == "" or isinstance(field.default, bool):
        return help_of(field)
    return f"{help_of(field)} (default: {field.default})"


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
        note = typer.Option(
            *names,
            help=_help(field),
            show_default=False,
            metavar=_METAVARS.get(str(field.type), "TEXT"),
        )
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
    SIGTERM ends it and frees the memory; SIGHUP, or `kvstore restart`, starts it again with the
    content kept.

    Example: kvstore serve --cpu 64GiB --ssd /var/cache/kvstore
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
