"""The example for SGLang runs as its first lines say, and shows what it promises; on a machine
without a GPU with the stubs and the plugin that SGLang needs there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sglang")

from tests.adapters.sglang.cpu.engine_driver import ROOT, environment

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize("flags", [[], ["--linker"]], ids=["hicache", "linker"])
def test_hicache(flags: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "sglang_hicache.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "log").open("wb"),
        env={**environment(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)},
        cwd=tmp_path,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout, (tmp_path / "log").read_text()[-6000:])
    assert "tokens identical: yes" in done.stdout
    cold, warm, flushed = (line for line in done.stdout.splitlines() if "prompt tokens" in line)
    assert "cold" in cold
    assert ", 0 of 1500 prompt tokens from kvstore" in cold
    assert ", 0 of 1500 prompt tokens from kvstore" in warm
    assert "flushed" in flushed
    assert ", 1488 of 1500 prompt tokens from kvstore" in flushed
    if not flags:
        assert "KVStoreHiCache" in flushed


def test_pd(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / "sglang_pd.py")],
            stdout=subprocess.PIPE,
            stderr=log,
            env={**environment(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)},
            cwd=tmp_path,
            text=True,
            check=False,
        )
    said = (tmp_path / "log").read_text()
    assert done.returncode == 0, (done.stdout, said[-6000:])
    assert "tokens identical: yes" in done.stdout
    # A short one to warm up, and twice the prompt.
    assert "hand-off to 127.0.0.1:" in said
