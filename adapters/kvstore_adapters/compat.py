"""Which releases of the engines these adapters were tested with; said at start."""

from __future__ import annotations

import logging
from importlib import metadata

logger = logging.getLogger(__name__)

# First and last release, both tested. Engines change what connectors use in any release.
TESTED = {"sglang": ("0.5.23", "0.5.23")}


def check_release(engine: str) -> None:
    """Warn when the installed release of `engine` is none that was tested. It may well work."""
    first, last = TESTED[engine]
    try:
        found = metadata.version(engine)
    except metadata.PackageNotFoundError:
        return  # it is there, from a source tree without a version
    if not _release(first) <= _release(found) <= _release(last):
        tested = first if first == last else f"{first} to {last}"
        logger.warning(
            "%s %s: kvstore was tested with %s %s; if something is wrong, look here first",
            engine,
            found,
            engine,
            tested,
        )


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers: 0.5.23.post1 and 0.5.23+cpu are 0.5.23."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
