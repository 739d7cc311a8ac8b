"""NIXL's Python package: found under each of its names, with one clear error where it is not."""

from __future__ import annotations

import importlib
import logging
from importlib import metadata
from pathlib import Path
from types import ModuleType

from kvstore import ConfigError
from kvstore_adapters.compat import check_release

logger = logging.getLogger(__name__)

# By CUDA's major version; both run without CUDA.
PACKAGES = ("nixl_cu13", "nixl_cu12", "nixl")
_NETLINK = "libnl-route-3"


def load() -> ModuleType:
    """Return the module with `nixl_agent`.

    Raises:
        ConfigError: NIXL is not installed, or does not load.
    """
    failures = []
    for name in PACKAGES:
        try:
            module = importlib.import_module(f"{name}._api")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith(name):
                failures.append(f"{name} needs {error.name}")
            continue
        except ImportError as error:  # a library that it links to
            failures.append(f"{name}: {error}")
            continue
        check_release("nixl", _version(name))
        return module
    why = "; ".join(failures) or "it is not installed"
    raise ConfigError(
        f"nixl: {why}. Try: pip install --no-deps nixl-cu12 (without --no-deps it brings torch)"
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return ""


def ends_badly() -> bool:
    """Whether this process will die of SIGSEGV at its very end, after Python has finished.

    NIXL's wheel brings a libnl-route, and its RDMA transports also load the system's libibverbs,
    which brings another; at exit one calls into the other. It harms nothing but the exit status.
    Three ways out: a system without that library; UCX_MODULES=^ib in the environment, when there is
    no RDMA to use; or to end by os._exit once everything is closed and flushed.
    """
    copies = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if Path(line.split()[-1]).name.startswith(_NETLINK)
    }
    return len(copies) > 1


def warn_of_end() -> None:
    if ends_badly():
        logger.warning(
            "this process has two copies of %s and will crash when it exits, after its work is "
            "done: see kvstore_adapters.nixl.ends_badly",
            _NETLINK,
        )
