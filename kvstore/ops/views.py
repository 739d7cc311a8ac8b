"""A daemon's status as tables: what `status` prints once and `top` every second.

Every field is read as if it could be missing: a daemon of a neighbouring version is shown as far as
it goes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kvstore.config import format_bytes
from kvstore.ops.common import number

_BLOCKS = " ▁▂▃▄▅▆▇█"
_HALVES = " ▏▎▍▌▋▊▉█"
_STATE_STYLE = {"serving": "green", "draining": "yellow", "adopting": "yellow"}
# Counters of which any but zero is worth a look.
_TROUBLE = {
    "kvstore_integrity_failures_total": "blocks failed their checksum",
    "kvstore_ssd_write_failures_total": "blocks that the ssd did not take",
    "kvstore_ssd_read_failures_total": "blocks that the ssd did not give back",
    "kvstore_background_errors_total": "background steps failed",
    "kvstore_deadline_exceeded_total": "calls gave up at their deadline",
    "kvstore_protocol_errors_total": "connections sent what is no frame",
    "kvstore_auth_failures_total": "connections failed to prove a token",
    "kvstore_write_behind_dropped_blocks_total": "blocks stay in DRAM only: write-behind was full",
}


def rows_of(status: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """A list of the status; empty when it is not there."""
    found = status.get(name)
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def plain(value: object) -> Text:
    """Text of others: no markup, no control characters that a terminal would obey."""
    return Text("".join(c if c.isprintable() else "?" for c in str(value)))


def duration(seconds: float) -> str:
    """For people: 42 s, 12 min, 3.4 h, 5.6 d."""
    for size, unit in ((86400.0, "d"), (3600.0, "h")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def bar(share: float, width: int = 24) -> Text:
    """A filled bar, to an eighth of a character."""
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    text = "█" * (eighths // 8) + (_HALVES[eighths % 8] if eighths % 8 else "")
    style = "red" if share > 0.98 else "yellow" if share > 0.9 else "cyan"
    return Text(text.ljust(width, "·"), style=style)


def sparkline(values: Sequence[float], width: int = 60, top: float | None = None) -> str:
    """The last values as one line; `top` is the value of a full character."""
    shown = list(values[-width:])
    highest = top if top is not None else max(shown, default=0.0)
    if highest <= 0:
        return _BLOCKS[1] * len(shown)
    steps = [min(8, max(0, round(value / highest * 8))) for value in shown]
    return "".join(_BLOCKS[max(1, step)] for step in steps)


def history(status: Mapping[str, Any], column: int) -> list[float]:
    found = status.get("history")
    rows = found if isinstance(found, list) else []
    return [number(row[column]) for row in rows if isinstance(row, list) and len(row) > column]


def headline(status: Mapping[str, Any]) -> Text:
    state = str(status.get("state", "unknown"))
    line = Text.assemble(
        ("kvstore ", "bold"),
        (str(status.get("version", "?")), "bold"),
        "  ",
        (state, _STATE_STYLE.get(state, "red")),
        f"  up {duration(number(status.get('uptime_seconds')))}, pid {status.get('pid', '?')}",
    )
    for address in status.get("addresses") or ():
        line.append(f"  {address}", style="dim")
    return line


def rates(status: Mapping[str, Any]) -> Text:
    found = status.get("rates")
    now: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    load, store = (number(now.get(f"{name}_bytes_per_second")) for name in ("load", "store"))
    return Text(
        f"hit ratio {number(now.get('hit_ratio')):.1%}   load {format_bytes(load)}/s   "
        f"store {format_bytes(store)}/s   {number(now.get('requests_per_second')):,.0f} requests/s"
    )


def held(status: Mapping[str, Any]) -> Text:
    """What is open, and what the last start took over."""
    parts = [
        f"{number(status.get(name)):,.0f} {name.replace('_', ' ')}"
        for name in ("leases", "reservations", "quarantined_slots")
    ]
    text = Text(", ".join(parts))
    adopted = status.get("adopted")
    if isinstance(adopted, Mapping):
        told = ", ".join(f"{name} {number(value):,.6g}" for name, value in adopted.items())
        text.append(f"   adopted at start: {told}", style="dim")
    return text


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(
            column,
            justify="right" if column in right else "left",
            overflow="ellipsis",
            no_wrap=column != "message",
        )
    return table


def tiers(status: Mapping[str, Any]) -> Table:
    table = _table("tier", "fill", "used", "of", "%", "blocks", right=("used", "of", "%", "blocks"))
    for tier in rows_of(status, "tiers"):
        used, capacity = number(tier.get("used_bytes")), number(tier.get("capacity_bytes"))
        share = used / capacity if capacity else 0.0
        table.add_row(
            str(tier.get("tier", "?")),
            bar(share),
            format_bytes(used),
            format_bytes(capacity),
            f"{share:.1%}",
            f"{number(tier.get('blocks')):,.0f}",
        )
    return table


def clients(status: Mapping[str, Any], at_most: int = 20) -> Table:
    table = _table(
        "client",
        "pid",
        "uid",
        "connections",
        "requests",
        "in",
        "out",
        "connected",
        right=("pid", "uid", "connections", "requests", "in", "out", "connected"),
    )
    found = sorted(rows_of(status, "clients"), key=_bytes_of_client, reverse=True)
    for client in found[:at_most]:
        table.add_row(
            plain(client.get("label") or client.get("address") or "?"),
            *(str(client.get(name, "")) for name in ("pid", "uid", "connections")),
            f"{number(client.get('requests')):,.0f}",
            format_bytes(number(client.get("bytes_in"))),
            format_bytes(number(client.get("bytes_out"))),
            duration(number(client.get("connected_seconds"))),
        )
    if len(found) > at_most:
        table.add_row(f"and {len(found) - at_most} more")
    return table


def _bytes_of_client(client: Mapping[str, Any]) -> float:
    return number(client.get("bytes_in")) + number(client.get("bytes_out"))


def tenants(status: Mapping[str, Any]) -> Table:
    table = _table(
        "tenant",
        "cpu",
        "cpu quota",
        "ssd",
        "ssd quota",
        "blocks",
        right=("cpu", "cpu quota", "ssd", "ssd quota", "blocks"),
    )
    for tenant in rows_of(status, "tenants"):
        table.add_row(
            plain(tenant.get("name") or "default"),
            format_bytes(number(tenant.get("cpu_used_bytes"))),
            _quota(tenant.get("cpu_quota_bytes")),
            format_bytes(number(tenant.get("ssd_used_bytes"))),
            _quota(tenant.get("ssd_quota_bytes")),
            f"{number(tenant.get('blocks')):,.0f}",
        )
    return table


def holders(status: Mapping[str, Any]) -> Table:
    """Other daemons that blocks were fetched from."""
    table = _table("holder", "state", "by", "why", "speed", right=("speed",))
    peers = status.get("peers")
    for holder in rows_of(peers, "holders") if isinstance(peers, Mapping) else ():
        speed = number(holder.get("bytes_per_second"))
        table.add_row(
            plain(holder.get("address")),
            "away" if holder.get("is_away") else "there",
            plain(holder.get("mover")),
            plain(holder.get("reason")),
            f"{format_bytes(speed)}/s" if speed else "",
        )
    return table


def _quota(value: object) -> str:
    return format_bytes(number(value)) if number(value) else "none"


def namespaces(found: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("number", "tenant", "model", "block", "digest", right=("number", "block"))
    for namespace in found:
        table.add_row(
            str(namespace.get("number", "?")),
            plain(namespace.get("tenant") or "default"),
            plain(namespace.get("model", "?")),
            format_bytes(number(namespace.get("block_bytes"))),
            str(namespace.get("digest", ""))[:16],
        )
    return table


def namespace_texts(found: Sequence[Mapping[str, Any]]) -> Text:
    """All that makes each namespace what it is: engines that do not share differ here."""
    said = Text()
    for namespace in found:
        described = namespace.get("description")
        texts = {**described, **described.get("spec", {})} if isinstance(described, Mapping) else {}
        kept = [f"{k}={v}" for k, v in texts.items() if v != "" and k not in ("version", "spec")]
        said += Text(f"\n{namespace.get('number', '?')}: ") + plain("; ".join(kept))
    return said


def hot_prefixes(status: Mapping[str, Any], at_most: int = 10) -> Table:
    table = _table(
        "hottest prefix", "namespace", "uses", "blocks", right=("namespace", "uses", "blocks")
    )
    for prefix in rows_of(status, "hot_prefixes")[:at_most]:
        table.add_row(
            str(prefix.get("first_block", ""))[:16],
            str(prefix.get("namespace", "?")),
            f"{number(prefix.get('uses')):,.0f}",
            f"{number(prefix.get('blocks')):,.0f}",
        )
    return table


def errors(status: Mapping[str, Any], at_most: int = 8) -> Table:
    table = _table("time", "level", "message")
    for error in rows_of(status, "recent_errors")[-at_most:]:
        moment = time.strftime("%m-%d %H:%M:%S", time.localtime(number(error.get("time"))))
        level = str(error.get("level", "")).lower()
        style = "red" if level in ("error", "critical") else "yellow"
        table.add_row(moment, Text(level, style=style), plain(error.get("message", "")))
    return table


def trouble(status: Mapping[str, Any]) -> list[str]:
    """One line for each counter of failures that is not zero."""
    found = status.get("metrics")
    metrics: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    return [
        f"{number(metrics.get(name)):,.0f} {what}"
        for name, what in _TROUBLE.items()
        if number(metrics.get(name)) > 0
    ]


def sections(status: Mapping[str, Any], *, short: bool = False) -> Iterator[RenderableType]:
    """Everything of a status; tables without rows are left out. `short`: what fits a screen."""
    yield headline(status)
    yield rates(status)
    yield held(status)
    ratio = history(status, 1)
    if ratio:
        yield Text(f"hit ratio  {sparkline(ratio, top=1.0)}", style="green")
        yield Text(f"load       {sparkline(history(status, 2))}", style="cyan")
        yield Text(f"store      {sparkline(history(status, 3))}", style="magenta")
    at_most = 5 if short else 20
    tables = [
        tiers(status),
        clients(status, at_most),
        tenants(status),
        holders(status),
        hot_prefixes(status, at_most),
        errors(status, at_most),
    ]
    if not short:
        tables.insert(3, namespaces(rows_of(status, "namespaces")))
    yield from (table for table in tables if table.row_count)
    for line in trouble(status):
        yield Text(line, style="yellow")
