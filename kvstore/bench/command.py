"""The `bench` command, and the list of what can be measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvstore.bench import daemon, dram, prefix, ssd, transport
from kvstore.bench.report import Figure, Report
from kvstore.bench.timing import Scale
from kvstore.errors import ConfigError


@dataclass(frozen=True)
class Measurement:
    """Figures that one run gives together."""

    names: tuple[str, ...]
    run: Callable[[Scale, Path], Sequence[Figure]]  # the path: a directory on the disk to measure


MEASUREMENTS = (
    Measurement(
        (
            "memcpy_16x1MiB",
            "put_16x1MiB",
            "load_16x1MiB",
            "put_16x1MiB_paged",
            "load_16x1MiB_paged",
        ),
        lambda scale, _: dram.batches(scale),
    ),
    Measurement(("get_64KiB_p50_us", "put_64KiB_p50_us"), lambda scale, _: dram.singles(scale)),
    Measurement(
        ("hash_128k_ms", "hash_128k_sha256_ms", "hash_128k_vllm_sha256_cbor_ms"),
        lambda scale, _: prefix.hashing(scale),
    ),
    Measurement(
        ("match_8192_ms", "match_8192_unlinked_ms", "hash_match_128k_ms"),
        lambda scale, _: prefix.matching(scale),
    ),
    Measurement(
        (
            "index_bytes_per_block",
            "index_lookup_growth",
            "index_match_growth",
            "index_lookup_ns",
        ),
        lambda scale, _: prefix.index(scale),
    ),
    Measurement(("disk_write", "ssd_write_1MiB", "disk_read", "ssd_read_1MiB"), ssd.limits),
    Measurement(("recover_100k_blocks_s",), ssd.recovery),
)
NAMES = tuple(name for measurement in MEASUREMENTS for name in measurement.names)


def run(
    only: Sequence[str] = (),
    directory: Path | None = None,
    quick: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Figure]:
    """Measure `only` these figures (default: all), with disk files below `directory`.

    Raises:
        ConfigError: no such figure, or the directory cannot be used.
    """
    _check_names(only, NAMES)
    wanted = set(only) or set(NAMES)
    figures: list[Figure] = []
    for measurement in MEASUREMENTS:
        if wanted.intersection(measurement.names):
            progress(measurement.names[0])
            figures += measurement.run(Scale(quick), directory or Path.cwd())
    return [figure for figure in figures if figure.name in wanted]


def run_daemon(
    only: Sequence[str] = (),
    address: str = "",
    *,
    full: bool = False,
    quick: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Figure]:
    """Measure `only` these figures of the daemon at `address`, or of one of our own.

    Raises:
        ConfigError: no such figure, or a daemon that cannot be measured.
        KVStoreError: the daemon cannot be reached or started.
    """
    _check_names(only, daemon.NAMES)
    wanted = set(only) or set(daemon.NAMES) - (frozenset() if full else daemon.FULL_ONLY)
    return daemon.run(wanted, address, Scale(quick), progress)


def _check_names(only: Sequence[str], known: Sequence[str]) -> None:
    unknown = sorted(set(only) - set(known))
    if unknown:
        raise ConfigError(f"only: {unknown[0]!r} is not one of {', '.join(known)}")


def bench(  # noqa: PLR0913, PLR0917 (one for each option)
    context: typer.Context,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="NAME",
            help="Measure only this figure; several times, or with commas.",
        ),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--ssd",
            metavar="DIR",
            help="Directory on the disk to measure; default: the current one.",
        ),
    ] = None,
    connect: Annotated[
        str,
        typer.Option(metavar="unix:/PATH", help="Measure this daemon instead of the library."),
    ] = "",
    of_daemon: Annotated[
        bool, typer.Option("--daemon", help="Measure a daemon, started for this.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Of a daemon: also what takes long and much memory.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes and few rounds: only an indication.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a Markdown table.")
    ] = False,
) -> None:
    """Measure this machine: what the store does, beside memcpy, the disk and plain Python.

    With --connect or --daemon: what a daemon does for its clients.
    """
    if context.invoked_subcommand is not None:
        return
    names = [name for text in only or () for name in text.split(",") if name]
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        status = console.status("measuring")
        if console.is_terminal:
            stack.enter_context(status)

        def progress(name: str) -> None:
            status.update(f"measuring {name} ...")

        if connect or of_daemon:
            figures = run_daemon(names, connect, full=full, quick=quick, progress=progress)
        else:
            figures = run(names, directory, quick, progress)
    Report(figures, quick).show(as_json=as_json, as_markdown=as_markdown)


app = typer.Typer(add_completion=False)
app.callback(invoke_without_command=True)(bench)
app.command("transport")(transport.transport)
