"""The command line. Each command lives in a module of its own; this one only finds them.

Commands of the library are listed in BUILT_IN; adapters add theirs by the entry-point group
`kvstore.commands`, since the library never imports an adapter. A command is a function with typer's
annotations. It raises KVStoreError for what went wrong: one line on stderr and exit status 1, or 2
for a wrong setting; a traceback is a bug.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from importlib import import_module, metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from kvstore.errors import ConfigError, KVStoreError

ENTRY_POINTS = "kvstore.commands"
BUILT_IN = {  # name -> "module:function"
    "serve": "kvstore.ops.serve:serve",
    "status": "kvstore.ops.status:status",
    "top": "kvstore.ops.top:top",
    "inspect": "kvstore.ops.inspect:inspect",
    "verify": "kvstore.ops.verify:verify",
    "doctor": "kvstore.ops.doctor:doctor",
    "restart": "kvstore.ops.restart:restart",
    "bench": "kvstore.bench.command:bench",
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
    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KVStoreError as error:
            typer.echo(f"kvstore: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


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


def build_app(
    plugins: Iterable[metadata.EntryPoint] | None = None, only: str | None = None
) -> typer.Typer:
    """The application: built-in commands and those of `plugins` (default: all installed).

    `only` names a built-in command that is known to be wanted: nothing else is imported, which is
    a quarter of the time until a daemon serves again.
    """
    app = typer.Typer(
        cls=_Commands,
        name="kvstore",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    wanted = BUILT_IN if only is None else {only: BUILT_IN[only]}
    for name, target in wanted.items():
        module, _, function = target.partition(":")
        app.command(name, cls=_Command)(getattr(import_module(module), function))
    if only is not None:
        return app
    found = metadata.entry_points(group=ENTRY_POINTS) if plugins is None else plugins
    for plugin in sorted(found, key=lambda plugin: plugin.name):
        app.command(plugin.name, cls=_Command)(_loaded(plugin))
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
    command = sys.argv[1] if len(sys.argv) > 1 else None
    build_app(only=command if command in BUILT_IN else None)()
