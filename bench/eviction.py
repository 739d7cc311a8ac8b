"""How many blocks does each eviction policy find, compared with LRU and with the best possible?

Replays a request trace through the native policies at several capacities. A trace is a file of JSON
lines with `hash_ids`, one id for each block of the prompt, equal ids for equal prefixes (the format
of the Mooncake traces). The figure is the hit ratio that an engine can use: blocks in the leading
resident run of a request, over all blocks of all requests.

    python bench/eviction.py conversation_trace.jsonl
    python bench/eviction.py conversation_trace.jsonl --capacities 1000,30000 --json
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore import _native
from kvstore.bench.report import Figure, Report

Request = npt.NDArray[np.uint64]
BASELINE = "lru"
BEST = "belady"


def read_trace(path: Path) -> list[Request]:
    with path.open(encoding="utf-8") as lines:
        return [np.array(json.loads(line)["hash_ids"], dtype=np.uint64) for line in lines]


def policy_hits(name: str, requests: Sequence[Request], capacity_blocks: int) -> int:
    simulator = _native.PolicySimulator(name, capacity_blocks)
    return sum(simulator.request(ids) for ids in requests)


def belady_hits(requests: Sequence[Request], capacity_blocks: int) -> int:
    """Returns the most hits that any policy can have (Belady's MIN, with bypass).

    After each request it keeps the blocks that are needed again soonest. An ancestor is never
    needed later than its descendants, so with ties decided for the ancestor what it keeps is
    prefix-closed, and all its hits can be used.
    """
    never = len(requests)
    upcoming: dict[int, int] = {}
    next_uses: list[list[int]] = []
    for index in range(len(requests) - 1, -1, -1):
        ids = requests[index].tolist()
        next_uses.append([upcoming.get(block, never) for block in ids])
        upcoming.update(dict.fromkeys(ids, index))
    next_uses.reverse()

    hits = 0
    kept: dict[int, int] = {}  # block -> its next use
    farthest: list[tuple[int, int, int]] = []  # (-next use, -depth, block), with stale entries
    for request, uses in zip(requests, next_uses, strict=True):
        for depth, (block, use) in enumerate(zip(request.tolist(), uses, strict=True)):
            hits += kept.pop(block, None) is not None
            if use != never:
                kept[block] = use
                heapq.heappush(farthest, (-use, -depth, block))
        while len(kept) > capacity_blocks:
            use, _, block = heapq.heappop(farthest)
            if kept.get(block) == -use:
                del kept[block]
    return hits


@dataclass(frozen=True)
class Row:
    policy: str
    capacity_blocks: int
    hit_ratio: float
    against_lru: float


def measure(requests: Sequence[Request], capacities: Sequence[int]) -> list[Row]:
    blocks = sum(len(ids) for ids in requests)
    rows = []
    for capacity in capacities:
        hits = {
            name: policy_hits(name, requests, capacity) for name in _native.eviction_policy_names()
        }
        hits[BEST] = belady_hits(requests, capacity)
        for name, count in hits.items():
            against = count / hits[BASELINE] if hits[BASELINE] else float("nan")
            rows.append(Row(name, capacity, count / blocks, against))
    return rows


def as_figures(trace: str, rows: Sequence[Row]) -> list[Figure]:
    return [
        Figure(
            f"hit_ratio.{trace}.{row.policy}.{row.capacity_blocks}",
            row.hit_ratio,
            "hits/block",
            row.against_lru,
            BASELINE,
        )
        for row in rows
    ]


def print_table(rows: Sequence[Row]) -> None:
    capacities = sorted({row.capacity_blocks for row in rows})
    cells = {(row.policy, row.capacity_blocks): row for row in rows}
    print(f"{'blocks':<10}" + "".join(f"{capacity:>18,}" for capacity in capacities))
    for name in dict.fromkeys(row.policy for row in rows):
        line = f"{name:<10}"
        for capacity in capacities:
            row = cells[name, capacity]
            line += f"{row.hit_ratio:>10.4f} ({row.against_lru:.2f}x)"
        print(line)
    print(f"hits usable as prefix, over blocks asked for; in brackets against {BASELINE}")


def positive(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, not {number}")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace", type=Path, help="JSON lines with `hash_ids`")
    parser.add_argument(
        "--capacities",
        type=lambda text: [positive(part) for part in text.split(",")],
        default=[1_000, 3_000, 10_000, 30_000, 100_000],
        help="blocks, separated by commas (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print figures as one JSON object")
    options = parser.parse_args(arguments)
    try:
        requests = read_trace(options.trace)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"trace: cannot read {options.trace}: {error!r}")
    if not any(len(ids) for ids in requests):
        parser.error(f"trace: {options.trace} has no blocks")
    rows = measure(requests, options.capacities)
    if options.json:
        Report(as_figures(options.trace.stem, rows)).show(as_json=True)
    else:
        print_table(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
