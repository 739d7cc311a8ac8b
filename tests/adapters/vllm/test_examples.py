"""The examples for vLLM run as their first lines say, and show what they promise.

They name the connector as a user does, so vLLM has to find it by our entry point.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.adapters.vllm import support

pytestmark = [
    *support.pytestmark,
    pytest.mark.skipif(
        "kvstore" not in entry_points(group="vllm.general_plugins").names,
        reason="kvstore-llm is on the path, but not installed",
    ),
]


def run(script: str, directory: Path, *arguments: str) -> str:
    with (directory / "log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, str(support.ROOT / "examples" / script), *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            # The user's own daemon, if there is one, is left alone.
            env=support.environment_of_engines({"XDG_RUNTIME_DIR": str(directory)}),
            cwd=directory,
            text=True,
            check=False,
        )
    assert done.returncode == 0, (done.stdout, (directory / "log").read_text()[-6000:])
    return done.stdout


def test_shared_cache(tmp_path: Path) -> None:
    shown = run("vllm_shared_cache.py", tmp_path)
    assert "first engine: TTFT" in shown
    assert "tokens identical: yes" in shown
    assert ", 0 of 1500 prompt tokens from kvstore" in shown
    assert ", 1408 of 1500 prompt tokens from kvstore" in shown


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--push"]], ids=["pull", "push"])
def test_prefill_and_decode(flags: list[str], tmp_path: Path) -> None:
    shown = run("vllm_pd.py", tmp_path, *flags)
    assert "tokens identical to one server's: yes" in shown
    assert "the decode server got from kvstore: 0" not in shown
