"""`mooncake.store` for engines that import it by that name.

    PYTHONPATH="$(python -m kvstore_adapters.mooncake.shim)" vllm serve ...

puts the package `mooncake` that lies beside this file before any other, in the engine and in all
processes that it starts. Only `mooncake.store` is there: what needs Mooncake's transfer engine
(`mooncake.engine`) fails to import.
"""

from __future__ import annotations

import sys
from pathlib import Path

PATH = str(Path(__file__).parent)


def install() -> None:
    """The same for this process alone.

    Raises:
        RuntimeError: another `mooncake` was imported before.
    """
    loaded = sys.modules.get("mooncake")
    if loaded is not None and not str(loaded.__file__).startswith(PATH):
        raise RuntimeError(f"mooncake: {loaded.__file__} is imported already")
    if PATH not in sys.path:
        sys.path.insert(0, PATH)
