"""What does admission to the ssd tier save in writes, and what does it cost in hits?

Replays a request trace through two tiers, both LRU: DRAM, and an ssd below it, with the admission
policies of `kvstore.tiers.admission` on the trace's clock. A trace is a file of JSON lines with
`hash_ids`, one id for each block of the prompt, equal ids for equal prefixes, and `timestamp` in
milliseconds (the format of the Mooncake traces). A budget is given in blocks a second.

    python bench/admission.py conversation_trace.jsonl
    python bench/admission.py conversation_trace.jsonl --tiers 1000+9000 --budgets 10,40 --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvstore.bench.report import Figure, Report
from kvstore.config import Admission
from kvstore.tiers.admission import AdmissionPolicy, HashRows, Origin, make_admission

BASELINE = "all"


@dataclass(frozen=True)
class Request:
    seconds: float
    ids: list[int]
    hashes: HashRows


def hashes_of(ids: Sequence[int]) -> HashRows:
    """Hashes as wide as real ones and as well mixed where the policies look (splitmix64)."""
    mixed = np.array(ids, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    rows = np.zeros((len(ids), 4), np.uint64)
    rows[:, 0] = mixed
    rows[:, 1] = ids
    return rows.view(np.uint8)


def read_trace(path: Path) -> list[Request]:
    requests = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            ids = [int(block) for block in row["hash_ids"]]
            requests.append(Request(row["timestamp"] / 1000, ids, hashes_of(ids)))
    return requests


class TwoTiers:
    """DRAM over ssd, by the rules of `kvstore.tiers`: an ssd copy needs its parent's."""

    def __init__(self, cpu_blocks: int, ssd_blocks: int) -> None:
        self._capacity = {"cpu": cpu_blocks, "ssd": ssd_blocks}
        self._cpu: OrderedDict[int, None] = OrderedDict()
        self._ssd: OrderedDict[int, None] = OrderedDict()
        self.now = 0.0
        self.hits = self.ssd_hits = self.writes = self.skipped = 0

    def request(self, request: Request, policy: AdmissionPolicy) -> None:
        self.now = request.seconds
        ids, hashes = request.ids, request.hashes
        held = next(
            (i for i, block in enumerate(ids) if block not in self._cpu and block not in self._ssd),
            len(ids),
        )
        self.hits += held
        self.ssd_hits += sum(block not in self._cpu for block in ids[:held])
        in_cpu = np.array([block in self._cpu for block in ids[:held]], bool)
        missing = np.array([block not in self._ssd for block in ids[:held]], bool)
        again = policy.used(hashes[:held][in_cpu & missing], 1)
        self._write(ids, again, Origin.USED, policy)
        for origin, admitted in policy.stored(0, hashes[held:]):
            self._write(ids, admitted, origin, policy)
        # The tail first, so that what continues a block is never more recent than the block.
        for block in reversed(ids):
            self._cpu[block] = None
            self._cpu.move_to_end(block)
            if block in self._ssd:
                self._ssd.move_to_end(block)
        while len(self._cpu) > self._capacity["cpu"]:
            self._cpu.popitem(last=False)
        while len(self._ssd) > self._capacity["ssd"]:
            self._ssd.popitem(last=False)

    def _write(
        self, ids: list[int], admitted: HashRows, origin: Origin, policy: AdmissionPolicy
    ) -> None:
        if len(admitted) == 0:
            return
        last = ids.index(int(admitted[-1].view(np.uint64)[1]))
        # With what comes before the last of them: the gaps.
        todo = [block for block in ids[: last + 1] if block not in self._ssd]
        granted = policy.grant(origin, len(todo), 1)
        self.writes += granted
        self.skipped += len(todo) - granted
        for block in todo[:granted]:
            self._ssd[block] = None


@dataclass(frozen=True)
class Row:
    tiers: str
    admission: str
    hits: float
    ssd_hits: float
    writes: float
    skipped: float


def replay(
    requests: Sequence[Request], cpu: int, ssd: int, kind: Admission, budget: int
) -> TwoTiers:
    tiers = TwoTiers(cpu, ssd)
    policy = make_admission(kind, budget, ssd, lambda: tiers.now)
    for request in requests:
        tiers.request(request, policy)
    return tiers


def measure(
    requests: Sequence[Request], sizes: Sequence[tuple[int, int]], budgets: Sequence[int]
) -> list[Row]:
    blocks = sum(len(request.ids) for request in requests)
    kinds: tuple[Admission, ...] = ("all", "reuse")
    rows = []
    for cpu, ssd in sizes:
        for budget in (0, *budgets):
            for kind in kinds:
                got = replay(requests, cpu, ssd, kind, budget)
                name = f"{kind} {budget}/s" if budget else kind
                shares = (got.hits, got.ssd_hits, got.writes, got.skipped)
                rows.append(Row(f"{cpu}+{ssd}", name, *(count / blocks for count in shares)))
    return rows


def as_figures(trace: str, rows: Sequence[Row]) -> list[Figure]:
    figures = []
    for row in rows:
        base = next(r for r in rows if r.tiers == row.tiers and r.admission == BASELINE)
        name = f"{trace}.{row.tiers}.{row.admission.replace(' ', '.').replace('/s', '')}"
        for what in ("hits", "writes"):
            value, against = getattr(row, what), getattr(base, what)
            ratio = value / against if against else float("nan")
            figures.append(Figure(f"ssd_{what}.{name}", value, f"{what}/block", ratio, BASELINE))
    return figures


def print_table(rows: Sequence[Row]) -> None:
    columns = ("hits", "of ssd", "writes", "skipped", "hits/all", "writes/all")
    print(f"{'dram+ssd':<14}{'admission':<14}" + "".join(f"{name:>11}" for name in columns))
    for row in rows:
        base = next(r for r in rows if r.tiers == row.tiers and r.admission == BASELINE)
        values = (row.hits, row.ssd_hits, row.writes, row.skipped)
        line = f"{row.tiers:<14}{row.admission:<14}" + "".join(f"{v:>11.4f}" for v in values)
        print(line + f"{row.hits / base.hits:>10.2f}x{row.writes / base.writes:>10.2f}x")
    print("per block asked for; a budget is in blocks a second; capacities in blocks")


def tier_sizes(text: str) -> list[tuple[int, int]]:
    sizes = []
    for part in text.split(","):
        cpu, ssd = (int(number) for number in part.split("+"))
        if cpu <= 0 or ssd <= 0:
            raise argparse.ArgumentTypeError(f"must be positive, not {part}")
        sizes.append((cpu, ssd))
    return sizes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace", type=Path, help="JSON lines with `hash_ids` and `timestamp`")
    parser.add_argument(
        "--tiers", type=tier_sizes, default=[(1_000, 9_000), (3_000, 27_000)],
        help="blocks of DRAM + ssd, separated by commas (default: 1000+9000,3000+27000)",
    )  # fmt: skip
    parser.add_argument(
        "--budgets", type=lambda text: [int(part) for part in text.split(",")],
        default=[5, 10, 20, 40], help="blocks a second, separated by commas (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print figures as one JSON object")
    options = parser.parse_args(arguments)
    try:
        requests = read_trace(options.trace)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"trace: cannot read {options.trace}: {error!r}")
    if not any(request.ids for request in requests):
        parser.error(f"trace: {options.trace} has no blocks")
    rows = measure(requests, options.tiers, options.budgets)
    if options.json:
        Report(as_figures(options.trace.stem, rows)).show(as_json=True)
    else:
        print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
