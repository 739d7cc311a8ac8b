"""What `kvstore demo` prints: figures for programs, a table for people."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kvstore.bench.report import commit, machine

from .cluster_settings import Mode
from .counters import TransferCounters
from .results import RequestResult, RunResult

if TYPE_CHECKING:
    from rich.console import Group


class Name:
    """Names of runs."""

    COLOCATED = "colocated"
    PD = "pd"
    COLD = "pd+cache cold"
    DRAM = "pd+cache DRAM"
    SHARED = "second engine"
    ENGINE_KILLED = "engine killed"
    DAEMON_KILLED = "daemon killed"
    SSD = "pd+cache SSD"


# Figures of time to first token beside the cold run's; null where the run is left out.
WARM = {
    "ttft_warm_cpu_ms": Name.DRAM,
    "ttft_warm_second_engine_ms": Name.SHARED,
    "ttft_warm_engine_restart_ms": Name.ENGINE_KILLED,
    "ttft_warm_daemon_restart_ms": Name.DAEMON_KILLED,
    "ttft_warm_ssd_ms": Name.SSD,
}


@dataclass(frozen=True)
class DemoRun:
    name: str
    mode: Mode
    result: RunResult

    @property
    def ttft_ms(self) -> float:
        return _mean_ms(r.ttft_s for r in self.result.requests)

    @property
    def tpot_ms(self) -> float:
        return _mean_ms(r.tpot_s for r in self.result.requests)

    @property
    def latency_ms(self) -> float:
        return _mean_ms(r.latency_s for r in self.result.requests)

    @property
    def output_tokens_per_s(self) -> float:
        return sum(len(r.token_ids) for r in self.result.requests) / self.result.wall_s

    @property
    def prompt_tokens_per_s(self) -> float:
        return sum(r.prompt_tokens for r in self.result.requests) / self.result.wall_s

    @property
    def hit_ratio(self) -> dict[str, float]:
        """Shares of the prompts' full blocks that prefill took from each tier, or computed."""
        return _hit_ratio([self.result.prefill])

    @property
    def bytes_loaded(self) -> int:
        return self.result.prefill.loaded_bytes + self.result.decode.loaded_bytes

    @property
    def bytes_saved(self) -> int:
        return self.result.prefill.saved_bytes + self.result.decode.saved_bytes

    @property
    def bytes_moved(self) -> int:
        return self.bytes_loaded + self.bytes_saved


def report(runs: list[DemoRun]) -> dict[str, Any]:
    """The object that `--json` prints."""
    by_name = {run.name: run for run in runs}
    cold = by_name[Name.COLD]
    identical = tokens_identical(runs)
    tiers = [by_name[name] for name in (Name.COLD, Name.DRAM, Name.SSD) if name in by_name]
    hit_ratio = _hit_ratio([run.result.prefill for run in tiers])
    moved = sum(run.bytes_moved for run in runs)
    ttft = {figure: by_name[name].ttft_ms for figure, name in WARM.items() if name in by_name}
    disaggregated, colocated = by_name[Name.PD], by_name[Name.COLOCATED]
    figures = [
        figure("tokens_identical", identical, "bool"),
        figure("ttft_cold_ms", cold.ttft_ms, "ms", disaggregated.ttft_ms, "pd without cache"),
        *(figure(name, ms, "ms", cold.ttft_ms, "ttft_cold_ms") for name, ms in ttft.items()),
        figure("tpot_ms", cold.tpot_ms, "ms", colocated.tpot_ms, "colocated"),
        figure("ttft_colocated_ms", colocated.ttft_ms, "ms"),
        figure("ttft_pd_ms", disaggregated.ttft_ms, "ms", colocated.ttft_ms, "colocated"),
        *(figure(f"hit_ratio_{tier}", value, "ratio") for tier, value in hit_ratio.items()),
        figure("bytes_moved", moved, "bytes"),
    ]
    return {
        "commit": commit(),
        "machine": machine(),
        "figures": figures,
        "tokens_identical": identical,
        "ttft_cold_ms": number(cold.ttft_ms),
        **{name: number(ttft.get(name)) for name in WARM},
        "tpot_ms": number(cold.tpot_ms),
        "hit_ratio": hit_ratio,
        "bytes_moved": moved,
        "runs": [run_figures(run) for run in runs],
    }


def tokens_identical(runs: list[DemoRun]) -> bool:
    """Every request ended, with the same tokens in every run."""
    seen: dict[str, list[int]] = {}
    for run in runs:
        for request in run.result.requests:
            if request.error is not None:
                return False
            if seen.setdefault(request.request_id, request.token_ids) != request.token_ids:
                return False
    return len({len(run.result.requests) for run in runs}) == 1


def _hit_ratio(counters: list[TransferCounters]) -> dict[str, float]:
    blocks = {
        "cpu": sum(each.hit_cpu_blocks for each in counters),
        "ssd": sum(each.hit_ssd_blocks for each in counters),
    }
    queried = sum(each.queried_blocks for each in counters)
    blocks["missed"] = queried - sum(blocks.values())
    return {tier: count / max(1, queried) for tier, count in blocks.items()}


def figure(
    name: str,
    value: float | bool,
    unit: str,
    theirs: float | None = None,
    against: str | None = None,
) -> dict[str, Any]:
    """`theirs` is a time of the same run to compare with: theirs / ours."""
    ratio = theirs / value if theirs is not None and value else None
    return {
        "name": name,
        "value": value if isinstance(value, bool) else number(value),
        "unit": unit,
        "ratio": number(ratio),
        "against": against,
    }


def run_figures(run: DemoRun) -> dict[str, Any]:
    store = run.result.store
    return {
        "name": run.name,
        "mode": run.mode.value,
        "wall_s": number(run.result.wall_s),
        "ttft_ms": number(run.ttft_ms),
        "tpot_ms": number(run.tpot_ms),
        "latency_ms": number(run.latency_ms),
        "output_tokens_per_s": number(run.output_tokens_per_s),
        "prompt_tokens_per_s": number(run.prompt_tokens_per_s),
        "hit_ratio": run.hit_ratio,
        "bytes_loaded": run.bytes_loaded,
        "bytes_saved": run.bytes_saved,
        "bytes_ssd_read": int(store.get("kvstore_ssd_read_bytes_total", 0)),
        "bytes_ssd_written": int(store.get("kvstore_ssd_written_bytes_total", 0)),
        "store_errors": run.result.prefill.errors + run.result.decode.errors,
        "requests": [_request(request) for request in run.result.requests],
    }


def _request(request: RequestResult) -> dict[str, Any]:
    return {
        "id": request.request_id,
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": len(request.token_ids),
        "ttft_ms": number(request.ttft_s * 1e3),
        "tpot_ms": number(request.tpot_s * 1e3),
        "latency_ms": number(request.latency_s * 1e3),
        "prefill_cached_tokens": request.prefill_cached_tokens,
        "decode_cached_tokens": request.decode_cached_tokens,
        "retries": request.retries,
        "error": request.error,
    }


_WORDS = {
    Name.DRAM: "warm",
    Name.SHARED: "in a second engine",
    Name.ENGINE_KILLED: "after kill -9 of both engines",
    Name.DAEMON_KILLED: "after kill -9 of the daemon",
    Name.SSD: "from SSD alone",
}


def table(runs: list[DemoRun], result: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    times = Table(title="Means over each run's requests, times in ms, rates in tokens/s")
    for header in ("run", "TTFT", "TPOT", "latency", "output", "prompt", "wall s"):
        times.add_column(header, justify="left" if header == "run" else "right", no_wrap=True)
    kv = Table(title="KV through the store: prompts' blocks by tier, and MiB")
    for header in ("run", "DRAM", "SSD", "computed", "loaded", "saved", "SSD read"):
        kv.add_column(header, justify="left" if header == "run" else "right", no_wrap=True)
    for run in runs:
        times.add_row(
            run.name,
            f"{run.ttft_ms:.1f}",
            f"{run.tpot_ms:.1f}",
            f"{run.latency_ms:.0f}",
            f"{run.output_tokens_per_s:.1f}",
            f"{run.prompt_tokens_per_s:.0f}",
            f"{run.result.wall_s:.1f}",
        )
        if run.mode is not Mode.COLOCATED:
            ratio = run.hit_ratio
            kv.add_row(
                run.name,
                *(f"{ratio[name]:.1%}" for name in ("cpu", "ssd", "missed")),
                mebibytes(run.bytes_loaded),
                mebibytes(run.bytes_saved),
                mebibytes(run.result.store.get("kvstore_ssd_read_bytes_total", 0)),
            )
    by_name = {run.name: run for run in runs}
    cold = by_name[Name.COLD].ttft_ms
    speedups = [
        f"{cold / by_name[name].ttft_ms:.1f}x {words}"
        for name, words in _WORDS.items()
        if name in by_name
    ]
    same = result["tokens_identical"]
    text = (
        f"tokens identical in all {len(runs)} runs: {'yes' if same else 'NO'}\n"
        f"TTFT against the cold run: {', '.join(speedups)}"
    )
    return Group(times, kv, Text(text, style="green" if same else "bold red"))


def mebibytes(size: float) -> str:
    return f"{size / (1 << 20):.1f}"


def _mean_ms(seconds: Iterable[float]) -> float:
    known = [value for value in seconds if not math.isnan(value)]
    return fmean(known) * 1e3 if known else math.nan


def number(value: float | None) -> float | None:
    """JSON has no NaN; four digits are more than a run can be trusted for."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")
