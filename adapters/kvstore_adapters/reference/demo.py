"""`kvstore demo`: the main job.

The same requests colocated, disaggregated, and with the store cold, warm from DRAM, and warm from
SSD in a fresh process; tokens must be the same every time.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from kvstore import ConfigError, DeadlineExceededError

from . import tokenizer as tokenizers
from .demo_report import DemoRun, report, table
from .fresh import run_in_fresh_process
from .messages import ModelSource
from .pd import Cluster, ClusterSettings, Mode, Prompt, RequestResult, RunResult
from .scheduler import WorkerSettings
from .workload import make_sessions

# So that the demo ends in about a minute on two cores.
DOCUMENT_TOKENS = {"nano": 1024, "tiny": 4096, "small": 1024, "medium": 256}
FLUSH_SECONDS_MAX = 60.0


@dataclass(frozen=True)
class DemoSettings:
    model: ModelSource
    num_requests: int = 10
    prefill_workers: int = 1
    decode_workers: int = 1
    max_new_tokens: int = 16
    document_tokens: int | None = None
    cpu: str = "512MiB"
    ssd: Path | None = None
    layerwise: bool = False
    start_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("num_requests", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive")


def run_demo(
    settings: DemoSettings, on_progress: Callable[[str, int, int], None] = lambda *_: None
) -> list[DemoRun]:
    """All runs, in order. `on_progress(run, done, total)` is called as requests finish.

    Raises:
        KVStoreError: workers or store could not be started. Single requests that fail do not raise.
    """
    directory = settings.model.directory
    tokenizer = tokenizers.load(Path(directory) if directory is not None else None)
    sessions = make_sessions(
        tokenizer, settings.num_requests, settings.max_new_tokens, settings.document_tokens
    )
    total = 5 * settings.num_requests
    done = 0

    def follow(name: str) -> Callable[[RequestResult], None]:
        on_progress(name, done, total)

        def finished(_: RequestResult) -> None:
            nonlocal done
            done += 1
            on_progress(name, done, total)

        return finished

    runs: list[DemoRun] = []
    for mode in (Mode.COLOCATED, Mode.PD):
        # No ssd, whatever the environment says.
        with Cluster(
            _cluster(settings, mode, sessions, {"cpu": settings.cpu, "ssd": ""})
        ) as cluster:
            runs.append(DemoRun(mode.value, mode, cluster.run(sessions, follow(mode.value))))
    with tempfile.TemporaryDirectory(prefix="kvstore-demo-", dir=settings.ssd) as ssd:
        cached = _cluster(settings, Mode.PD_CACHE, sessions, {"cpu": settings.cpu, "ssd": ssd})
        with Cluster(cached) as cluster:
            cold = cluster.run(sessions, follow("pd+cache cold"))
            runs.append(DemoRun("pd+cache cold", Mode.PD_CACHE, cold))
            warm = cluster.run(sessions, follow("pd+cache DRAM"))
            runs.append(DemoRun("pd+cache DRAM", Mode.PD_CACHE, warm))
            assert cluster.store is not None
            if not cluster.store.flush(FLUSH_SECONDS_MAX):
                raise DeadlineExceededError(
                    f"ssd: the blocks were not written within {FLUSH_SECONDS_MAX:g} s"
                )
        fresh: RunResult = run_in_fresh_process(cached, sessions, follow("pd+cache SSD"))
        runs.append(DemoRun("pd+cache SSD", Mode.PD_CACHE, fresh))
    return runs


def _cluster(
    settings: DemoSettings, mode: Mode, sessions: list[list[Prompt]], store: dict[str, str]
) -> ClusterSettings:
    page_tokens = WorkerSettings().page_tokens
    # Room for the longest request of every session at once, so that none is preempted.
    longest = [max(len(p.token_ids) + p.max_new_tokens for p in session) for session in sessions]
    pages = sum(-(-tokens // page_tokens) for tokens in longest)
    return ClusterSettings(
        mode,
        settings.model,
        settings.prefill_workers,
        settings.decode_workers,
        WorkerSettings(num_pages=pages, sequences_max=max(16, len(sessions))),
        store,
        settings.layerwise,
        start_timeout_s=settings.start_timeout_s,
        request_timeout_s=300.0,
    )


def command(  # noqa: PLR0913 - one argument an option
    *,
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Hugging Face Llama or Qwen checkpoint.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="Random model where there is no --model: tiny, small or medium.")
    ] = "tiny",
    seed: Annotated[int, typer.Option(help="Of the random model.")] = 0,
    requests: Annotated[int, typer.Option(help="How many requests a run has.")] = 10,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each.")] = 16,
    document_tokens: Annotated[
        int | None, typer.Option(help="Cut the document to so many tokens; 0: whole.")
    ] = None,
    prefill_workers: Annotated[int, typer.Option(help="Processes that prefill.")] = 1,
    decode_workers: Annotated[int, typer.Option(help="Processes that decode.")] = 1,
    cpu: Annotated[str, typer.Option(help="DRAM of the store.")] = "512MiB",
    ssd: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where to make the store's temporary directory: a file system on the disk to use.",
        ),
    ] = None,
    layerwise: Annotated[
        bool, typer.Option("--layerwise", help="Save KV layer by layer beside the forward.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the runs into a picture.")
    ] = None,
) -> None:
    """Serve real text through prefill and decode workers, cold, warm from DRAM, warm from SSD.

    Exit status 1 when a request failed or tokens differ between runs.
    """
    _check_surroundings(model, ssd, plot)
    if document_tokens is None and model is None:
        document_tokens = DOCUMENT_TOKENS.get(size)
    settings = DemoSettings(
        ModelSource(model, size, seed),
        requests,
        prefill_workers,
        decode_workers,
        max_new_tokens,
        document_tokens or None,
        cpu,
        ssd,
        layerwise,
    )
    runs = _run_with_progress(settings)
    result = report(runs)
    if json_output:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        from rich.console import Console

        Console().print(table(runs, result))
    if plot is not None:
        from .demo_plot import draw

        draw(runs, plot)
    for run in runs:
        for request in run.result.requests:
            if request.error is not None:
                typer.echo(f"{run.name}: {request.request_id}: {request.error}", err=True)
    if not result["tokens_identical"]:
        raise typer.Exit(1)


def _check_surroundings(model: str | None, ssd: Path | None, plot: Path | None) -> None:
    """What can be seen to be missing before a minute has been spent."""
    _require("torch", "torch")
    if plot is not None:
        _require("matplotlib", "plot")
        if not plot.parent.is_dir():
            raise ConfigError(f"plot: {plot.parent} is not a directory")
    if model is not None and not (Path(model) / "config.json").is_file():
        raise ConfigError(f"model: there is no {Path(model) / 'config.json'}")
    if ssd is not None and not ssd.is_dir():
        raise ConfigError(f"ssd: {ssd} is not a directory")


def _run_with_progress(settings: DemoSettings) -> list[DemoRun]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # On stderr, so that stdout is the result alone.
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("starting workers", total=None)

        def show(name: str, done: int, total: int) -> None:
            progress.update(bar, description=name, completed=done, total=total)

        return run_demo(settings, show)


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{package} is not installed; run: pip install 'kvstore-llm[{extra}]'")
