"""The command line. Each command lives in a module of its own; this one only finds them.

Commands of the library are listed in BUILT_IN; adapters add theirs by the entry-point group
`kvstore.commands`, since the library never imports an adapter. A command is a function with typer's
annotations. It raises KVStoreError for what went wrong: one line on stderr and exit status 1, or 2
for a wrong setting; a traceback is a bug.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module, metadata
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from kvstore.errors import ConfigError, KVStoreError

ENTRY_POINTS = "kvstore.commands"
BUILT_IN = {  # name -> "module:function", or "module:app" for a command that has others below it
    "serve": "kvstore.ops.serve:serve",
    "status": "kvstore.ops.status:status",
    "top": "kvstore.ops.top:top",
    "inspect": "kvstore.ops.inspect:inspect",
    "verify": "kvstore.ops.verify:verify",
    "doctor": "kvstore.ops.doctor:doctor",
    "restart": "kvstore.ops.restart:restart",
    "bench": "kvstore.bench.command:app",
}


def _plain(params: list[Any]) -> list[Any]:
    """Have help show a flag without the type of its value."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))


class _Commands(TyperGroup):
    """Loads a command when it is asked for: the daemon's start does not wait for all the others."""

    plugins: ClassVar[Iterable[metadata.EntryPoint] | None] = None

    def list_commands(self, ctx: Any) -> list[str]:
        return [*BUILT_IN, *sorted(self._found())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in BUILT_IN:
            module, _, function = BUILT_IN[cmd_name].partition(":")
            return _command(cmd_name, getattr(import_module(module), function))
        plugin = self._found().get(cmd_name)
        return None if plugin is None else _command(cmd_name, _loaded(plugin))

    def _found(self) -> dict[str, metadata.EntryPoint]:
        found = self.plugins
        if found is None:
            found = metadata.entry_points(group=ENTRY_POINTS)
        return {plugin.name: plugin for plugin in found if plugin.name not in BUILT_IN}

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KVStoreError as error:
            typer.echo(f"kvstore: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


def _command(name: str, function: Callable[..., Any] | typer.Typer) -> Any:
    if isinstance(function, typer.Typer):
        made: Any = get_command(function)
        for one in (made, *made.commands.values()):
            _plain(one.params)
        return made
    alone = typer.Typer(add_completion=False)
    alone.command(name, cls=_Command)(function)
    return get_command(alone)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            version = metadata.version("kvstore-llm")
        except metadata.PackageNotFoundError:
            version = "from a source tree that is not installed"
        typer.echo(f"kvstore {version}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """A tiered KV-cache store for LLM inference."""


def build_app(plugins: Iterable[metadata.EntryPoint] | None = None) -> typer.Typer:
    """The application: built-in commands and those of `plugins` (default: all installed)."""
    chosen = None if plugins is None else list(plugins)
    app = typer.Typer(
        cls=type("Commands", (_Commands,), {"plugins": chosen}),
        name="kvstore",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    return app


def _loaded(plugin: metadata.EntryPoint) -> Callable[..., Any]:
    """The plugin's command; one that cannot be imported says so when it is called, not before."""
    try:
        command: Callable[..., Any] = plugin.load()
    except ImportError as error:
        why = f"{plugin.name}: {plugin.value} cannot be imported: {error}"

        def command() -> None:
            raise KVStoreError(why)

        command.__doc__ = f"Not available: {error}"
    return command


def main() -> None:
    build_app()()
