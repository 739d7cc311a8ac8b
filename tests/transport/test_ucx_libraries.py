"""Every libucp of this machine passes what the first one does: the suite of UCX and the contract of
movers, in a process of its own with $KVSTORE_UCX_LIB, since a process loads one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.transport import ucx_library

ROOT = Path(__file__).parents[2]
SUITES = ["test_ucx.py", "test_ucx_process.py", "test_contract.py"]


def others() -> list[str]:
    return [library.path for library in ucx_library.candidates()[1:] if not library.problem]


@pytest.mark.slow
@pytest.mark.parametrize("path", others() or [""], ids=str)
def test_every_library_passes(path: str) -> None:
    if not path:
        pytest.skip("no second libucp (libucx-cu12, or NIXL's wheel)")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-k", "ucx", "-p", "no:cacheprovider"]
        + [f"tests/transport/{suite}" for suite in SUITES],
        cwd=ROOT,
        env={**os.environ, "KVSTORE_UCX_LIB": path},
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-2000:]
