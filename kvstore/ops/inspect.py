"""`kvstore inspect`: what is known of namespaces and blocks, of a daemon or of a directory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvstore import wire
from kvstore.admin import Admin
from kvstore.config import format_bytes
from kvstore.errors import ConfigError
from kvstore.ops import views
from kvstore.ops.common import (
    ConfigOption,
    ConnectOption,
    JsonOption,
    TimeoutOption,
    TokenOption,
    console,
    failures,
    print_json,
    target,
)
from kvstore.tiers.ssd_format import PAGE_BYTES
from kvstore.tiers.ssd_offline import OfflineDirectory

_HASH = re.compile(r"(?:0x)?([0-9a-fA-F]{64})")
_TIERS = (1, "cpu"), (2, "ssd")  # bits of a residency
_HASHES_MAX = 1 << 16  # of one question


def inspect(
    hashes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="HASH",
            help="Block hashes in hex, or @FILE with one a line.",
            show_default=False,
        ),
    ] = None,
    namespace: Annotated[
        str | None,
        typer.Option("--namespace", metavar="DIGEST", help="Start of the namespace's digest."),
    ] = None,
    ssd: Annotated[
        Path | None,
        typer.Option("--ssd", metavar="DIR", help="Look at an SSD directory that is not in use."),
    ] = None,
    connect: ConnectOption = None,
    config: ConfigOption = None,
    token_file: TokenOption = None,
    timeout: TimeoutOption = 2.0,
    as_json: JsonOption = False,
) -> None:
    """List a daemon's namespaces, or say what it knows of blocks; or what an SSD directory holds.

    With --ssd nothing is asked of a daemon and nothing is written.

    Example: kvstore inspect --namespace 3fa9 @hashes.txt
    """
    with failures(as_json):
        if ssd is not None:
            if hashes or namespace or connect:
                raise ConfigError("ssd: goes with neither --connect, --namespace nor hashes")
            _directory(ssd, as_json)
            return
        wanted = parse_hashes(hashes or [])
        if wanted and namespace is None:
            raise ConfigError(
                "namespace: hashes need --namespace; see `kvstore inspect` for a list"
            )
        with target(connect, config, token_file, timeout).open() as admin:
            found = _rows(admin.call(wire.AdminNamespaces()))
            if namespace is None:
                _print_namespaces(found, as_json)
            else:
                _print_blocks(admin, pick(found, namespace), wanted, as_json)


def parse_hashes(texts: Sequence[str]) -> list[bytes]:
    """Return the hashes that arguments and the files they name give.

    Raises:
        ConfigError: one is no hash, a file cannot be read, or there are too many.
    """
    found: list[bytes] = []
    for text in texts:
        lines = _lines(Path(text[1:])) if text.startswith("@") else [text]
        for line in lines:
            match = _HASH.fullmatch(line.strip())
            if match is None:
                raise ConfigError(f"hashes: {line.strip()[:80]!r} is not 64 hexadecimal digits")
            found.append(bytes.fromhex(match[1]))
    if len(found) > _HASHES_MAX:
        raise ConfigError(f"hashes: {len(found)} are more than the {_HASHES_MAX} of one question")
    return found


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="ascii")
    except OSError as error:
        raise ConfigError(f"hashes: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"hashes: {path} is not text of hexadecimal digits") from error
    return [line for line in text.splitlines() if line.strip()]


def pick(namespaces: Sequence[Mapping[str, Any]], prefix: str) -> Mapping[str, Any]:
    """Return the one namespace whose digest begins so.

    Raises:
        ConfigError: there is none, or more than one.
    """
    fitting = [n for n in namespaces if str(n.get("digest", "")).startswith(prefix.lower())]
    if not fitting:
        raise ConfigError(f"namespace: no digest begins with {prefix!r}")
    if len(fitting) > 1:
        raise ConfigError(f"namespace: {len(fitting)} digests begin with {prefix!r}; give more")
    return fitting[0]


def _rows(answer: object) -> list[Mapping[str, Any]]:
    return [row for row in answer if isinstance(row, Mapping)] if isinstance(answer, list) else []


def _print_namespaces(found: list[Mapping[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json({"namespaces": found})
    elif found:
        console().print(Group(views.namespaces(found), views.namespace_texts(found)))
    else:
        console().print("no namespaces: nothing was put yet")


def _print_blocks(
    admin: Admin, namespace: Mapping[str, Any], hashes: list[bytes], as_json: bool
) -> None:
    answer = admin.call(wire.AdminInspect(int(namespace["number"]), b"".join(hashes)))
    blocks = joined(hashes, answer if isinstance(answer, Mapping) else {})
    if as_json:
        print_json({"namespace": namespace, "blocks": blocks})
        return
    out = console()
    out.print(views.namespaces([namespace]))
    if blocks:
        out.print()
        out.print(_generic(blocks))


def joined(hashes: Sequence[bytes], answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each hash asked for: where it is, and what else the daemon says of it."""
    known = {str(row.get("hash")): row for row in _rows(answer.get("blocks"))}
    places = answer.get("residency")
    where = places if isinstance(places, list) and len(places) == len(hashes) else [0] * len(hashes)
    return [
        {
            "hash": block_hash.hex(),
            "tiers": [name for bit, name in _TIERS if int(place) & bit],
            **known.get(block_hash.hex(), {}),
        }
        for block_hash, place in zip(hashes, where, strict=True)
    ]


def _generic(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Columns as the daemon names them; long hexadecimal shortened."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(*(_cell(row.get(name, "")) for name in names))
    return table


def _cell(value: object) -> Text:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    text = str(value)
    return views.plain(text[:16] if _HASH.fullmatch(text) else text)


# -- a directory


def describe_directory(directory: OfflineDirectory) -> dict[str, Any]:
    """What the directory holds, as JSON. Reads the index, and of each segment its header."""
    bad_records = sum(bad for _, bad in directory.records())
    return {
        "path": str(directory.path),
        "uuid": directory.uuid.hex(),
        "index": directory.index_fault or "sound",
        "bad_records": bad_records,
        "file_bytes": sum(segment.bytes for segment in directory.segments),
        "blocks": sum(n.live_blocks for n in directory.namespaces.values()),
        "namespaces": [
            {
                "number": n.number,
                "digest": n.digest.hex(),
                "tenant": n.tenant,
                "model": n.namespace.model if n.namespace else None,
                "block_bytes": n.namespace.spec.block_bytes if n.namespace else None,
                "blocks": n.live_blocks,
                "stored_bytes": n.stored_bytes,
                "raw_bytes": n.raw_bytes,
                "codecs": n.codecs,
            }
            for n in directory.namespaces.values()
        ],
        "segments": [
            {
                "number": segment.number,
                "bytes": segment.bytes,
                "header": segment.fault or "sound",
                "live_blocks": segment.live_blocks,
                "live_bytes": segment.live_pages * PAGE_BYTES,
            }
            for segment in directory.segments
        ],
        "foreign": directory.foreign,
        "leftovers": directory.leftovers,
    }


def _directory(path: Path, as_json: bool) -> None:
    with OfflineDirectory(path) as directory:
        found = describe_directory(directory)
    if as_json:
        print_json(found)
        return
    head = Text(
        f"{found['path']}: {found['blocks']:,} blocks in {len(found['segments'])} segments of "
        f"{format_bytes(found['file_bytes'])} together; index {found['index']}"
    )
    parts: list[RenderableType] = [head, Text(), _namespace_table(found["namespaces"]), Text()]
    parts.append(_segment_table(found["segments"]))
    if found["bad_records"]:
        parts.append(Text(f"{found['bad_records']} index records are damaged", style="red"))
    for name in ("foreign", "leftovers"):
        if found[name]:
            parts.append(Text(f"{name}: ", style="yellow") + views.plain(", ".join(found[name])))
    console().print(Group(*parts))


def _namespace_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("namespace", "model", "block", "blocks", "stored", "raw", "codecs"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            str(row["digest"])[:16],
            views.plain(row["model"] if row["model"] is not None else "(not readable)"),
            format_bytes(row["block_bytes"]) if row["block_bytes"] else "?",
            f"{row['blocks']:,}",
            format_bytes(row["stored_bytes"]),
            format_bytes(row["raw_bytes"]),
            ", ".join(f"{name} {count:,}" for name, count in row["codecs"].items()),
        )
    return table


def _segment_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("segment", "size", "live", "", "blocks", "header"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            f"{row['number']:010d}",
            format_bytes(row["bytes"]),
            format_bytes(row["live_bytes"]),
            views.bar(row["live_bytes"] / row["bytes"] if row["bytes"] else 0.0, 16),
            f"{row['live_blocks']:,}",
            row["header"],
        )
    return table
