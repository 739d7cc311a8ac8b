"""What the tests of UCX share."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kvstore.errors import KVStoreError
from kvstore.transport import ucx_library

ROOT = Path(__file__).parents[2]
SECRET = bytes(range(32))


def library() -> ucx_library.UcxLibrary:
    try:
        return ucx_library.find()
    except KVStoreError as error:
        pytest.skip(str(error))


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
