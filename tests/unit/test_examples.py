"""The example that needs no engine runs; those of engines are run in tests/adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_embedded() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "embedded.py")],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        check=True,
    )
    assert "160 tokens to skip" in done.stdout
    assert "bytes identical: True" in done.stdout
