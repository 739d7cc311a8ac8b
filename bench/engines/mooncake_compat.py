"""How fast is our client with Mooncake's methods beside Mooncake's own?

    python bench/engines/mooncake_compat.py [--venv-mooncake DIR] [--json | --markdown] [--rounds N]

16 values a call, put from and got into registered memory by address, and 16 keys looked up. Both
have their values in another process of this host: a kvstore daemon, and Mooncake's
`mooncake_client`, with its shared-memory client, its fastest way without RDMA, or by TCP.
`kvstore_unix` is our own interface on the same daemon: the difference is what keys that are text
and values of any size cost.

The stores take turns as in bench/peers/compare.py; a ratio says how many times as fast ours is.
DIR is an environment with `mooncake-transfer-engine-non-cuda`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.peers.compare import MIB, Comparison, adopt_descendants, compare  # noqa: E402
from kvstore.bench.report import Report  # noqa: E402

KIB = 1 << 10
COMPARISON = Comparison(
    "kvstore_mooncake",
    ("kvstore_mooncake", "kvstore_unix", "mooncake_shm", "mooncake_tcp"),
    {
        (MIB, 16): {"put": "batch_put_16x1MiB", "get": "batch_get_16x1MiB"},
        (64 * KIB, 16): {
            "put": "batch_put_16x64KiB",
            "get": "batch_get_16x64KiB",
            "lookup": "lookup_16",
        },
    },
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--venv-mooncake", type=Path, metavar="DIR", help="where Mooncake is")
    options = parser.parse_args()
    # Runners look for modules where this variable says.
    os.environ["PYTHONPATH"] = str(ROOT / "adapters")
    pythons = {name: Path(sys.executable) for name in COMPARISON.peers if "kvstore" in name}
    if options.venv_mooncake is not None:
        theirs = options.venv_mooncake / "bin" / "python"
        pythons |= {name: theirs for name in COMPARISON.peers if name not in pythons}
    adopt_descendants()
    report = Report(compare(COMPARISON, COMPARISON.peers, pythons, options.rounds))
    report.show(as_json=options.json, as_markdown=options.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
