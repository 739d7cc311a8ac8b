"""Fuzz one Python parser with atheris: python -m tests.fuzz.run TARGET SECONDS.

Starts from the corpus in tests/fuzz/corpus/TARGET; new inputs that reach new code go to
build/fuzz/TARGET, so that the kept corpus grows only on purpose (add what is worth keeping by
hand). A finding is written to build/fuzz/TARGET-crash-* and ends the run with an error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvstore", "msgspec", "tomllib"]):
    from tests.fuzz.targets import TARGETS

_HERE = Path(__file__).parent
_INPUT_BYTES_MAX = 1 << 16


def main() -> None:
    name, seconds = sys.argv[1], int(sys.argv[2])
    found = Path("build/fuzz", name)
    found.mkdir(parents=True, exist_ok=True)
    options = [
        sys.argv[0],
        f"-max_total_time={seconds}",
        f"-max_len={_INPUT_BYTES_MAX}",
        f"-artifact_prefix={found}-",
        "-print_final_stats=1",
        "-timeout=10",
        str(found),
        str(_HERE / "corpus" / name),
    ]
    atheris.Setup(options, TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
