"""Builds the native core, `kvstore._native`, from csrc/. Everything else is in pyproject.toml."""

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

SANITIZE = os.environ.get("KVSTORE_SANITIZE", "")  # e.g. "address,undefined" or "thread"
SOURCES = sorted(
    str(path)
    for part in ("core", "copy", "io", "net", "python")
    for path in Path("csrc", part).glob("*.cc")
)

# CPython builds extensions with -DNDEBUG, which would silently drop every assert().
flags = ["-UNDEBUG", "-O3", "-g1", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-pthread"]
if SANITIZE:
    flags += [f"-fsanitize={SANITIZE}", "-O1", "-fno-omit-frame-pointer"]


def is_stale(obj: str, source: str) -> bool:
    """True when the object file is older than its source or than any header."""
    if not os.path.exists(obj):
        return True
    inputs = [Path(source), *Path("csrc").rglob("*.h")]
    return os.path.getmtime(obj) < max(path.stat().st_mtime for path in inputs)


ParallelCompile("KVSTORE_BUILD_JOBS", needs_recompile=is_stale, default=0).install()
setup(
    ext_modules=[
        Pybind11Extension(
            "kvstore._native",
            SOURCES,
            include_dirs=["csrc"],
            depends=[str(path) for path in Path("csrc").rglob("*.h")],
            cxx_std=20,
            extra_compile_args=flags,
            extra_link_args=["-pthread"] + ([f"-fsanitize={SANITIZE}"] if SANITIZE else []),
        )
    ],
    cmdclass={"build_ext": build_ext},
)
