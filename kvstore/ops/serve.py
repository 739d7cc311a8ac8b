"""`kvstore serve`: run the daemon."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kvstore.config_sources import help_of
from kvstore.ops.common import ConfigOption
from kvstore.ops.serving import run, settings_of_daemon

_METAVARS = {"int | str": "BYTES", "int": "N", "float": "SECONDS"}  # by a field's annotation


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
    for field in settings_of_daemon():
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
    run(config=config, print_config=print_config, adopt=adopt, fresh=fresh, **flags)
