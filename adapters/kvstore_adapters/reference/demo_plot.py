"""The picture of `kvstore demo --plot`."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .demo_report import DemoRun

if TYPE_CHECKING:
    from .results import RequestResult

PHASE_COLORS = ("#bbccee", "#eecc88", "#ccddaa")
# One for each run of demo_report.Name.
COLORS = (
    *("#777777", "#4477aa", "#cc6677", "#ddaa33"),
    *("#66ccee", "#aa3377", "#332288", "#228833"),
)


def draw(runs: list[DemoRun], path: Path) -> None:
    """Four panels: request times, cumulative time, phase shares, time against lengths."""
    # Not pyplot: it would look for a display, and keep state for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 10), layout="constrained")
    FigureCanvasAgg(figure)
    (times, cumulative), (shares, lengths) = figure.subplots(2, 2)
    names = sorted(request.request_id for request in runs[0].result.requests)
    by_name = [{r.request_id: r for r in run.result.requests} for run in runs]
    _request_times(times, runs, by_name, names)
    _cumulative(cumulative, runs, by_name, names)
    _phase_shares(shares, runs)
    _against_length(lengths, runs)
    figure.legend(*times.get_legend_handles_labels(), loc="outside upper center", ncols=len(runs))
    figure.savefig(path, dpi=110)


def _request_times(
    axes: Any, runs: list[DemoRun], by_name: list[dict[str, RequestResult]], names: list[str]
) -> None:
    at = np.arange(len(names))
    width = 0.84 / len(runs)
    for index, run in enumerate(runs):
        latency = [by_name[index][name].latency_s for name in names]
        axes.bar(
            at + (index + 0.5) * width - 0.42, latency, width, label=run.name, color=COLORS[index]
        )
    axes.set_xticks(at, names, rotation=35, ha="right")
    axes.set_ylabel("latency, s")
    axes.set_title("Time of each request")


def _cumulative(
    axes: Any, runs: list[DemoRun], by_name: list[dict[str, RequestResult]], names: list[str]
) -> None:
    for index, run in enumerate(runs):
        total = list(accumulate(by_name[index][name].latency_s for name in names))
        axes.plot(range(1, len(names) + 1), total, marker="o", label=run.name, color=COLORS[index])
    axes.set_xlabel("requests, in the order of the panel on the left")
    axes.set_ylabel("sum of latencies, s")
    axes.set_ylim(bottom=0)
    axes.set_title("Cumulative time")


def _phase_shares(axes: Any, runs: list[DemoRun]) -> None:
    """Where the latency went. The second token has the hand-over to the decode worker in it."""
    phases = (
        "first token (queue, load, prefill, save)",
        "second token (hand-over)",
        "further tokens",
    )
    shares = np.array([_phases(run) for run in runs])
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1e-9)
    left = np.zeros(len(runs))
    for index, phase in enumerate(phases):
        axes.barh(
            range(len(runs)), shares[:, index], left=left, label=phase, color=PHASE_COLORS[index]
        )
        for row, share in enumerate(shares[:, index]):
            if share > 0.06:
                axes.text(left[row] + share / 2, row, f"{share:.0%}", ha="center", va="center")
        left += shares[:, index]
    axes.set_yticks(range(len(runs)), [run.name for run in runs])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of latency")
    axes.set_title("Phases")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize="small")


def _phases(run: DemoRun) -> tuple[float, float, float]:
    sums = [0.0, 0.0, 0.0]
    for request in run.result.requests:
        times = request.token_times_s
        if len(times) > 0:
            sums[0] += times[0]
        if len(times) > 1:
            sums[1] += times[1] - times[0]
            sums[2] += times[-1] - times[1]
    return sums[0], sums[1], sums[2]


def _against_length(axes: Any, runs: list[DemoRun]) -> None:
    for index, run in enumerate(runs):
        axes.scatter(
            [request.prompt_tokens for request in run.result.requests],
            [request.ttft_s * 1e3 for request in run.result.requests],
            label=run.name,
            color=COLORS[index],
        )
    axes.set_yscale("log")
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("TTFT, ms")
    axes.set_title("Time to first token against the prompt's length")
