"""`kvstore demo`: the main job.

The same requests colocated, disaggregated, and with engines on a daemon's cache: cold, warm, in a
second engine, after kill -9 of the engines, after kill -9 of the daemon, and from SSD alone. Tokens
must be the same every time. With --transport, see `demo_handoff`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from kvstore import ConfigError

from .demo_handoff import (
    DIRECTIONS,
    HandoffDemoSettings,
    handoff_report,
    handoff_table,
    run_handoff_demo,
)
from .demo_report import DemoRun, report, table
from .demo_runs import DemoSettings, run_demo
from .messages import ModelSource

if TYPE_CHECKING:
    from rich.console import Group

_Runs = TypeVar("_Runs")

# So that the demo ends in about a minute on two cores.
DOCUMENT_TOKENS = {"nano": 1024, "tiny": 4096, "small": 1024, "medium": 256}


def command(  # noqa: PLR0913 - one argument an option
    *,
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Hugging Face Llama or Qwen checkpoint.")
    ] = None,
    size: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="Random model where there is no --model: tiny, small or medium."
        ),
    ] = "tiny",
    seed: Annotated[int, typer.Option(metavar="N", help="Of the random model.")] = 0,
    requests: Annotated[int, typer.Option(metavar="N", help="How many requests a run has.")] = 10,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens to generate for each.")
    ] = 16,
    document_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Cut the document to so many tokens; 0: whole.")
    ] = None,
    prefill_workers: Annotated[int, typer.Option(metavar="N", help="Processes that prefill.")] = 1,
    decode_workers: Annotated[int, typer.Option(metavar="N", help="Processes that decode.")] = 1,
    connect: Annotated[
        str,
        typer.Option(metavar="unix:/PATH", help="Use this daemon; default: the demo runs its own."),
    ] = "",
    kill_daemon: Annotated[
        bool,
        typer.Option("--kill-daemon", help="Kill that daemon too, and start it again as it was."),
    ] = False,
    cpu: Annotated[
        str, typer.Option(metavar="BYTES", help="DRAM of the demo's own daemon.")
    ] = "512MiB",
    ssd: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where that one's ssd directory is made: a file system on the disk to use.",
        ),
    ] = None,
    layerwise: Annotated[
        bool, typer.Option("--layerwise", help="Save KV layer by layer beside the forward.")
    ] = False,
    transport: Annotated[
        str | None,
        typer.Option(
            metavar="MOVER",
            help="Hand KV off from pool to pool instead, by shm, tcp, ucx or auto; no daemon.",
        ),
    ] = None,
    hosts: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="With --transport: 2: prefill and decode workers in a network namespace each"
            " (needs root and iproute2).",
        ),
    ] = 1,
    handoff: Annotated[
        str, typer.Option(metavar="HOW", help="With --transport: push, pull or both.")
    ] = "both",
    kill_prefill: Annotated[
        bool,
        typer.Option(
            "--kill-prefill", help="With --transport: kill a prefill worker in mid-transfer too."
        ),
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the runs into a picture.")
    ] = None,
) -> None:
    """Serve real text through prefill and decode workers on one cache, whoever of them dies.

    Exit status 1 when a request failed or tokens differ between runs.
    """
    _check_surroundings(model, ssd, plot)
    if document_tokens is None and model is None:
        document_tokens = DOCUMENT_TOKENS.get(size)
    if transport is not None:
        if connect or kill_daemon or ssd is not None or plot is not None or layerwise:
            raise ConfigError("transport: there is no daemon, ssd, plot or layerwise with it")
        handed = HandoffDemoSettings(
            ModelSource(model, size, seed),
            transport,
            hosts,
            DIRECTIONS if handoff == "both" else (handoff,),
            kill_prefill,
            requests,
            prefill_workers,
            decode_workers,
            max_new_tokens,
            document_tokens or None,
        )
        _show_handoffs(handed, json_output)
        return
    if hosts != 1 or handoff != "both" or kill_prefill:
        raise ConfigError("hosts, handoff, kill_prefill: only with transport")
    settings = DemoSettings(
        ModelSource(model, size, seed),
        requests,
        prefill_workers,
        decode_workers,
        max_new_tokens,
        document_tokens or None,
        cpu,
        ssd,
        connect,
        kill_daemon,
        layerwise,
    )
    runs = _with_progress(lambda show: run_demo(settings, show))
    result = report(runs)
    _print(result, lambda: table(runs, result), json_output)
    if plot is not None:
        from .demo_plot import draw

        draw(runs, plot)
    _end(runs, result)


def _show_handoffs(settings: HandoffDemoSettings, json_output: bool) -> None:
    runs = _with_progress(lambda show: run_handoff_demo(settings, show))
    result = handoff_report(settings, runs)
    _print(result, lambda: handoff_table(runs, result), json_output)
    _end([each.run for each in runs], result)


def _print(result: dict[str, Any], shown: Callable[[], Group], json_output: bool) -> None:
    if json_output:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        from rich.console import Console

        Console().print(shown())


def _end(runs: list[DemoRun], result: dict[str, Any]) -> None:
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


def _with_progress(run: Callable[[Callable[[str, int, int], None]], _Runs]) -> _Runs:
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

        return run(show)


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{package} is not installed; run: pip install 'kvstore-llm[{extra}]'")
