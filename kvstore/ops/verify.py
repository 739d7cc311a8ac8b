"""`kvstore verify`: are the bytes right? Asked of a daemon, or checked in a directory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from kvstore import wire
from kvstore.admin import Admin
from kvstore.config import format_bytes
from kvstore.errors import ConfigError, IncompatibleError
from kvstore.ops import views
from kvstore.ops.common import (
    PROBLEM,
    ConfigOption,
    ConnectOption,
    JsonOption,
    TimeoutOption,
    TokenOption,
    console,
    failures,
    number,
    print_json,
    target,
)
from kvstore.tiers.ssd_offline import OfflineDirectory
from kvstore.tiers.ssd_verify import SsdReport, verify_directory

_STEP_SECONDS = 1.0  # of one question to a daemon, so that progress is seen
Advance = Callable[[int, int], None]


def verify(
    ssd: Annotated[
        Path | None,
        typer.Option("--ssd", metavar="DIR", help="Check an SSD directory that is not in use."),
    ] = None,
    findings: Annotated[
        int, typer.Option("--findings", min=0, help="Tell of at most so many damages one by one.")
    ] = 100,
    io: Annotated[str, typer.Option("--io", help="auto, uring or threads; with --ssd.")] = "auto",
    connect: ConnectOption = None,
    config: ConfigOption = None,
    token_file: TokenOption = None,
    timeout: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Check every checksum: a daemon's blocks in DRAM, or with --ssd all of a directory.

    A daemon removes what it finds damaged. With --ssd nothing is changed, and no store may have the
    directory open meanwhile. Blocks that were written just before a power loss, and not as durable,
    may be damaged: the store treats them as misses. Exit status 1 when damage was found.

    Example: kvstore verify --ssd /var/cache/kvstore --json
    """
    with failures(as_json):
        if ssd is not None:
            if connect:
                raise ConfigError("ssd: goes not with --connect")
            damaged = _offline(ssd, io, findings, as_json)
        else:
            with target(connect, config, token_file, timeout).open() as admin:
                damaged = _daemon(admin, timeout, as_json)
    if damaged:
        raise typer.Exit(PROBLEM)


@contextmanager
def _progress(what: str) -> Iterator[Advance]:
    """A bar on stderr, where that is a terminal."""
    err = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)
    with Progress(
        *columns,
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
        transient=True,
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# -- a directory


def report_json(report: SsdReport, seconds: float) -> dict[str, Any]:
    """The report with stable names."""
    return {
        **dataclasses.asdict(report),
        "damage": dict(report.damage),
        "num_damaged": report.num_damaged,
        "seconds": round(seconds, 3),
        "bytes_per_second": round(report.checked_bytes / seconds) if seconds > 0 else 0,
        "ok": report.num_damaged == 0,
    }


def _offline(path: Path, io: str, findings_max: int, as_json: bool) -> bool:
    if io not in ("auto", "uring", "threads"):
        raise ConfigError(f"io: {io!r} is not one of auto, uring, threads")
    began = time.monotonic()
    with OfflineDirectory(path) as directory, _progress(f"checking {path}") as advance:
        report = verify_directory(directory, io=io, findings_max=findings_max, progress=advance)
    found = report_json(report, time.monotonic() - began)
    if as_json:
        print_json(found)
    else:
        _print_report(report, found)
    return not found["ok"]


def _print_report(report: SsdReport, found: Mapping[str, Any]) -> None:
    out = console()
    out.print(
        f"{report.checked_blocks:,} blocks, {format_bytes(report.checked_bytes)} in "
        f"{found['seconds']:.1f} s ({format_bytes(found['bytes_per_second'])}/s), "
        f"{report.segments} segments, {report.summaries:,} summary pages, "
        f"{report.records:,} index records",
        soft_wrap=True,
    )
    out.print(
        f"{report.decoded_blocks:,} blocks are what was put; {report.undecoded_blocks:,} could not "
        f"be decoded here; {format_bytes(report.unreferenced_bytes)} are in use by no block",
        soft_wrap=True,
    )
    for note in report.notes:
        out.print(views.plain(f"note: {note}"), soft_wrap=True)
    for damage in report.findings:
        place = f"segment {damage.segment} page {damage.page}: " if damage.segment else ""
        out.print(views.plain(f"{damage.kind}: {place}{damage.detail}"), soft_wrap=True)
    if report.num_damaged:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(report.damage.items()))
        out.print(f"[red]damage found: {kinds}[/red]", soft_wrap=True)
    else:
        out.print("[green]no damage found[/green]")


# -- a daemon


def _daemon(admin: Admin, timeout: float, as_json: bool) -> bool:
    began = time.monotonic()
    checked = removed = 0
    with _progress(f"checking {admin.address}") as advance:
        total = _used_bytes(admin)
        while True:
            done, bad, whole = _step(admin, timeout)
            checked += done
            removed += bad
            advance(checked, max(total, checked))
            if whole:
                break
    seconds = time.monotonic() - began
    found = {
        "address": admin.address,
        "checked_bytes": checked,
        "removed_blocks": removed,
        "seconds": round(seconds, 3),
        "ok": removed == 0,
    }
    if as_json:
        print_json(found)
    elif removed:
        console().print(f"[red]{removed:,} damaged blocks were found and removed[/red]")
    else:
        console().print(f"[green]no damage found[/green] in {format_bytes(checked)} of DRAM")
    return removed > 0


def _step(admin: Admin, timeout: float) -> tuple[int, int, bool]:
    """One piece of a round: bytes checked, blocks removed, whether the round is whole."""
    answer = admin.call(wire.AdminVerify(_STEP_SECONDS), _STEP_SECONDS + timeout)
    if isinstance(answer, Mapping) and {"checked_bytes", "removed_blocks", "whole"} <= set(answer):
        return int(answer["checked_bytes"]), int(answer["removed_blocks"]), bool(answer["whole"])
    raise IncompatibleError(f"{admin.address}: answered a check with {str(answer)[:80]!r}")


def _used_bytes(admin: Admin) -> int:
    for tier in views.rows_of(admin.status(), "tiers"):
        if tier.get("tier") == "cpu":
            return int(number(tier.get("used_bytes")))
    return 0
