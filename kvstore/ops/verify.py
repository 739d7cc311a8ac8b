"""`kvstore verify`: are the bytes right? Asked of a daemon, or checked in a directory."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
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
from kvstore.errors import ConfigError, IncompatibleError, KVStoreError
from kvstore.ops import views
from kvstore.ops.common import (
    PROBLEM,
    ConfigOption,
    ConnectOption,
    JsonOption,
    Target,
    TimeoutOption,
    TokenOption,
    console,
    failures,
    number,
    print_json,
    target,
)
from kvstore.status import Scrubbed
from kvstore.tiers.ssd_offline import OfflineDirectory
from kvstore.tiers.ssd_report import SsdReport
from kvstore.tiers.ssd_verify import verify_directory

_GRACE_SECONDS = 10.0  # for the answer, once a daemon's time is up
_LOOK_SECONDS = 0.25
Advance = Callable[[int, int], None]


def verify(  # noqa: PLR0913  (one argument an option)
    *,
    ssd: Annotated[
        Path | None,
        typer.Option("--ssd", metavar="DIR", help="Check an SSD directory that is not in use."),
    ] = None,
    findings: Annotated[
        int, typer.Option("--findings", metavar="N", min=0, help="List at most so many damages.")
    ] = 100,
    io: Annotated[
        str, typer.Option("--io", metavar="KIND", help="With --ssd: auto, uring or threads.")
    ] = "auto",
    connect: ConnectOption = None,
    config: ConfigOption = None,
    token_file: TokenOption = None,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds", metavar="SECONDS", min=0.1, max=3600, help="The most a daemon may take."
        ),
    ] = 3600.0,
    timeout: TimeoutOption = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Check every checksum: a daemon's blocks in DRAM, or with --ssd all of a directory.

    A daemon removes what it finds damaged. With --ssd nothing is changed, and no store may have the
    directory open meanwhile. Blocks that were written just before a power loss, and not as durable,
    may be damaged: the store treats them as misses. Exit status 1 when damage was found, or not all
    could be checked.

    Example: kvstore verify --ssd /var/cache/kvstore --json
    """
    with failures(as_json):
        if ssd is not None:
            if connect:
                raise ConfigError("ssd: goes not with --connect")
            damaged = _offline(ssd, io, findings, as_json)
        else:
            damaged = _daemon(target(connect, config, token_file, timeout), seconds, as_json)
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


def _daemon(where: Target, seconds: float, as_json: bool) -> bool:
    began = time.monotonic()
    with (
        where.open() as asking,
        where.open() as watching,
        _progress(f"checking {where.address}") as advance,
    ):
        answer = _while_watching(watching, advance, lambda: _scrub(asking, seconds))
    found = {
        "address": where.address,
        **answer,
        "seconds": round(time.monotonic() - began, 3),
        "ok": answer["whole"] and not answer["removed_blocks"],
    }
    if as_json:
        print_json(found)
    else:
        _print_answer(answer, seconds)
    return not found["ok"]


def _print_answer(answer: Scrubbed, seconds: float) -> None:
    out = console()
    checked = format_bytes(answer["checked_bytes"])
    if answer["removed_blocks"]:
        text = f"{answer['removed_blocks']:,} damaged blocks were found and removed"
        out.print(f"[red]{text}[/red]")
    elif answer["whole"]:
        out.print(f"[green]no damage found[/green] in {checked} of DRAM")
    if not answer["whole"]:
        out.print(f"[yellow]not all was checked in {seconds:g} s: {checked} were[/yellow]")


def _scrub(admin: Admin, seconds: float) -> Scrubbed:
    answer = admin.call(wire.AdminVerify(seconds), seconds + _GRACE_SECONDS)
    if isinstance(answer, Mapping) and set(answer) >= {"checked_bytes", "removed_blocks", "whole"}:
        return {
            "checked_bytes": int(answer["checked_bytes"]),
            "removed_blocks": int(answer["removed_blocks"]),
            "whole": bool(answer["whole"]),
        }
    raise IncompatibleError(f"{admin.address}: answered a check with {str(answer)[:80]!r}")


def _while_watching(watching: Admin, advance: Advance, ask: Callable[[], Scrubbed]) -> Scrubbed:
    """Runs `ask` on a thread and follows how far the daemon's scrubber is meanwhile."""
    answer: Future[Scrubbed] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except KVStoreError as error:
            answer.set_exception(error)

    before, total = _scrubbed(watching)
    # A daemon thread: Ctrl-C must not wait for the answer.
    threading.Thread(target=run, name="kvstore-verify", daemon=True).start()
    while not wait([answer], _LOOK_SECONDS).done:
        with contextlib.suppress(KVStoreError):
            now, total = _scrubbed(watching)
            advance(min(now - before, total), total)
    return answer.result()


def _scrubbed(admin: Admin) -> tuple[int, int]:
    """Bytes that the scrubber has checked ever, and bytes there are in DRAM."""
    status = admin.status()
    used = [t.get("used_bytes") for t in views.rows_of(status, "tiers") if t.get("tier") == "cpu"]
    checked = number(status.get("metrics", {}).get("kvstore_scrub_checked_bytes_total"))
    return int(checked), int(number(used[0])) if used else 0
