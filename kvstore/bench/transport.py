"""How fast are our transports beside memcpy, bare sockets, bare UCX, NIXL and Mooncake?

Every way is two processes: one whose memory is read, one that reads and takes the time (`ends`).
They take turns in rounds, and are stopped in between: some of them poll without rest. What is not
ours lives in `bench/transport` of a checkout.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from kvstore.bench.contenders import Contender, ContenderError, End, compiled
from kvstore.bench.ends import TARGET_BYTES
from kvstore.bench.report import Figure, Report
from kvstore.bench.two_hosts import Host, HostsUnavailableError, TwoHosts
from kvstore.errors import ConfigError

KIB, MIB = 1 << 10, 1 << 20
SOURCE_BYTES = 128 * MIB
BATCH = 16
OURS = "kvstore.bench.transport_peer"
SEGMENT = "256k"  # of UCX over TCP; its default, 8 KiB, is five times as slow
_PEERS = Path(__file__).resolve().parents[2] / "bench" / "transport"
_HEADERS = {"raw_ucx_tcp": " (Debian: apt-get install libucx-dev)"}
_ONLY_IN_CHECKOUT = "only in a checkout of kvstore: bench/transport"


@dataclass(frozen=True)
class Workload:
    label: str
    size: int
    batch: int
    calls: int  # a turn

    @property
    def is_single(self) -> bool:
        return self.batch == 1

    @property
    def figure(self) -> str:
        return f"{self.label}_us" if self.is_single else self.label


WORKLOADS = (
    Workload("1MiB", MIB, BATCH, 8),
    Workload("64KiB", 64 * KIB, BATCH, 48),
    Workload("256KiB", 256 * KIB, BATCH, 16),
    Workload("4MiB", 4 * MIB, BATCH, 3),
    Workload("64KiB_single", 64 * KIB, 1, 100),
)
SIZES = sorted({workload.size for workload in WORKLOADS})
# Of ours against the best that others do with the same means.
PAIRS = (
    ("shm", "memcpy_2_threads"),
    ("tcp", "raw_tcp"),
    ("tcp", "nixl"),
    ("tcp", "nixl_tuned"),
    ("tcp", "mooncake_tcp"),
    ("ucx_tcp", "raw_ucx_tcp"),
)


@dataclass
class Way:
    """A name of the report; `variants`: of which the best counts, for each workload."""

    name: str
    variants: list[Contender] = field(default_factory=list)
    absent: str = ""


@dataclass(frozen=True)
class _Place:
    """Where the two ends run: two hosts, or this one."""

    hosts: TwoHosts | None

    @property
    def served(self) -> Host | None:
        return self.hosts.a if self.hosts else None

    @property
    def reading(self) -> Host | None:
        return self.hosts.b if self.hosts else None

    @property
    def addresses(self) -> tuple[str, str]:
        if self.hosts:
            return self.hosts.a.address, self.hosts.b.address
        return "127.0.0.1", "127.0.0.1"

    @property
    def device(self) -> str:
        return self.hosts.a.interface if self.hosts else "lo"


class _Ways:
    """All ways that are compared; those of a name that is not wanted are left out."""

    def __init__(self, place: _Place, work: Path, pythons: Mapping[str, Path]) -> None:
        self._place = place
        self._work = work
        self._pythons = pythons
        self._secret = secrets.token_hex(32)
        self.source = work / "source"

    def all(self) -> list[Way]:
        tuned = {"tls": "tcp", "devices": self._place.device, "segment": SEGMENT}
        nixl = [
            self._peer("nixl", "nixl", tls="tcp", devices=self._place.device),
            self._peer("nixl_tuned", "nixl", **tuned),
        ]
        if self._place.hosts is None:
            nixl.append(self._peer("nixl_one_host", "nixl"))
        return [
            self._local("memcpy", "memcpy", threads=1),
            self._local("memcpy_2_threads", "memcpy", threads=2),
            self._local("shm", "shm", verified=True),
            self._local("shm_unverified", "shm", verified=False),
            self._ours("tcp", "tcp", verified=True),
            self._ours("tcp_unverified", "tcp", verified=False),
            self._ours("ucx_tcp", "ucx", verified=True, settings=self._ucx_settings()),
            self._ours("ucx_tcp_unverified", "ucx", verified=False, settings=self._ucx_settings()),
            self._program("raw_tcp", "raw_tcp.c", [["1"], ["2"]], []),
            self._program(
                "raw_ucx_tcp", "raw_ucx.c", [[self._place.device, SEGMENT]], ["-lucp", "-lucs"]
            ),
            *nixl,
            self._peer("mooncake_tcp", "mooncake"),
        ]

    def _ucx_settings(self) -> dict[str, str]:
        return {"ucx_tls": "tcp", "ucx_devices": self._place.device}

    def _options(self, address: str, more: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "source": str(self.source),
            "address": address,
            "secret": self._secret,
            "sizes": SIZES,
            **more,
        }

    def _ends(self, peer: str, more: Mapping[str, Any], python: Path | None = None) -> Contender:
        place = self._place
        served, reading = (self._options(address, more) for address in place.addresses)
        return Contender(
            End.python(peer, "serve", served, place.served, python),
            End.python(peer, "read", reading, place.reading, python),
            is_parted=True,
        )

    def _local(self, name: str, way: str, **more: Any) -> Way:
        """Both ends on this host."""
        options = self._options("127.0.0.1", {"way": way, **more})
        serve = None if way == "memcpy" else End.python(OURS, "serve", options)
        return Way(name, [Contender(serve, End.python(OURS, "read", options))])

    def _ours(self, name: str, way: str, **more: Any) -> Way:
        return Way(name, [self._ends(OURS, {"way": way, **more})])

    def _peer(self, name: str, package: str, **more: Any) -> Way:
        script = _PEERS / f"{package}_peer.py"
        if not script.exists():
            return Way(name, absent=_ONLY_IN_CHECKOUT)
        return Way(name, [self._ends(str(script), more, self._pythons.get(package))])

    def _program(
        self, name: str, source: str, variants: Sequence[Sequence[str]], libraries: Sequence[str]
    ) -> Way:
        if not (_PEERS / source).exists():
            return Way(name, absent=_ONLY_IN_CHECKOUT)
        try:
            program = str(compiled(_PEERS / source, self._work, libraries))
        except ContenderError as error:
            return Way(name, absent=f"{error}{_HEADERS.get(name, '')}")
        address = self._place.addresses[0]
        way = Way(name)
        for variant in variants:
            end = [*variant, str(self.source)]
            serve = [program, "serve", address, *end]
            read = [program, "read", address, "{hello}", *end, str(TARGET_BYTES)]
            way.variants.append(
                Contender(
                    End(serve, self._place.served),
                    End(read, self._place.reading),
                    is_parted=True,
                )
            )
        return way


@contextlib.contextmanager
def _place(hosts: int) -> Iterator[_Place]:
    if hosts == 1:
        yield _Place(None)
        return
    try:
        both = TwoHosts()
    except HostsUnavailableError as error:
        raise ConfigError(f"hosts: {error}") from error
    with both:
        yield _Place(both)


def run(
    *,
    hosts: int = 1,
    only: Sequence[str] = (),
    quick: bool = False,
    pythons: Mapping[str, Path] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Figure]:
    """Measure all ways, or memcpy and `only` those.

    Args:
        hosts: 1: over loopback; 2: between two network namespaces.
        only: names of ways.
        quick: few rounds.
        pythons: the interpreter that has "nixl", "mooncake"; default: ours.
        progress: told what is being done.

    Raises:
        ConfigError: no such way, or there can be no two hosts here.
    """
    memory = Path("/dev/shm")
    with (
        _place(hosts) as place,
        tempfile.TemporaryDirectory(
            prefix="kvstore-bench-", dir=memory if memory.is_dir() else None
        ) as work,
    ):
        ways = _Ways(place, Path(work), pythons or {})
        _write_source(ways.source, hosts)
        chosen = ways.all()
        unknown = sorted(set(only) - {way.name for way in chosen})
        if unknown:
            raise ConfigError(
                f"only: {unknown[0]!r} is none of {', '.join(w.name for w in chosen)}"
            )
        chosen = [way for way in chosen if not only or way.name in {"memcpy", *only}]
        try:
            for way in chosen:
                progress(f"{way.name}: start")
                for contender in way.variants:
                    contender.start()
            _rounds(chosen, 4 if quick else 15, progress)
        finally:
            for way in chosen:
                for contender in way.variants:
                    contender.stop()
    return _figures(chosen)


def _write_source(path: Path, seed: int) -> None:
    np.frombuffer(np.random.default_rng(seed).bytes(SOURCE_BYTES), np.uint8).tofile(path)


def _rounds(ways: Sequence[Way], rounds: int, progress: Callable[[str], None]) -> None:
    """All contenders in turn, every other round backwards: noise hits all alike."""
    contenders = [contender for way in ways for contender in way.variants]
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        for workload in WORKLOADS:
            for contender in contenders[:: 1 if number % 2 == 0 else -1]:
                contender.turn(
                    workload.label, workload.size, workload.batch, workload.calls, number
                )


def _figures(ways: Sequence[Way]) -> list[Figure]:
    memcpy = next(way.variants[0] for way in ways if way.name == "memcpy")
    figures = []
    best: dict[tuple[str, str], Contender] = {}
    for way in ways:
        living = [contender for contender in way.variants if not contender.absent]
        if not living:
            why = way.absent or "; ".join(c.absent for c in way.variants)
            figures += [Figure.absent(f"{way.name}_{w.figure}", why) for w in WORKLOADS]
            continue
        for workload in WORKLOADS:
            chosen = min(living, key=lambda c: c.median(workload.label))
            best[way.name, workload.label] = chosen
            against = None if chosen is memcpy else f"memcpy; {chosen.version}"
            figures.append(_figure(way.name, workload, chosen, memcpy, against))
    for ours, theirs in PAIRS:
        for workload in WORKLOADS:
            a, b = best.get((ours, workload.label)), best.get((theirs, workload.label))
            if a is not None and b is not None:
                figures.append(_figure(f"{ours}_vs_{theirs}", workload, a, b, theirs))
    return figures


def _figure(
    name: str, workload: Workload, ours: Contender, theirs: Contender, against: str | None
) -> Figure:
    seconds = ours.median(workload.label)
    value, unit = workload.size * workload.batch / seconds / 1e9, "GB/s"
    if workload.is_single:
        value, unit = seconds * 1e6, "us"
    ratio = None if against is None else ours.speedup(theirs, workload.label)
    return Figure(f"{name}_{workload.figure}", value, unit, ratio, against)


def transport(
    hosts: Annotated[
        int, typer.Option(min=1, max=2, help="2: between two network namespaces; needs root.")
    ] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="Only this way and memcpy; several times."),
    ] = None,
    venv_nixl: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Virtual environment that has NIXL.")
    ] = None,
    venv_mooncake: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Virtual environment that has Mooncake.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds: only an indication.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a Markdown table.")
    ] = False,
) -> None:
    """Measure the transports beside memcpy, bare sockets, bare UCX, NIXL and Mooncake."""
    pythons: dict[str, Path] = {}
    for name, directory in (("nixl", venv_nixl), ("mooncake", venv_mooncake)):
        if directory is not None:
            pythons[name] = directory / "bin" / "python"
            if not pythons[name].exists():
                raise ConfigError(f"venv-{name}: {directory} is no virtual environment")
    names = [name for text in only or () for name in text.split(",") if name]
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        status = console.status("measuring")
        if console.is_terminal:
            stack.enter_context(status)
        figures = run(
            hosts=hosts,
            only=names,
            quick=quick,
            pythons=pythons,
            progress=lambda text: status.update(f"measuring: {text}"),
        )
    Report(figures, quick).show(as_json=as_json, as_markdown=as_markdown)
