"""How near does the SSD tier come to what the disk gives?

    python bench/ssd_limit.py [--json | --markdown] [--path DIR] [--mebibytes N] [--kind KIND]

The disk figures of `kvstore bench`, with a choice of engine and size; see kvstore/bench/ssd.py.
"""

import argparse
from pathlib import Path

from kvstore.bench.report import Report
from kvstore.bench.ssd import disk_figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--path", type=Path, default=Path.cwd())
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--kind", default="auto", choices=["auto", "uring", "threads"])
    options = parser.parse_args()
    figures = disk_figures(options.path, options.kind, options.mebibytes)
    Report(figures).show(as_json=options.json, as_markdown=options.markdown)


if __name__ == "__main__":
    main()
