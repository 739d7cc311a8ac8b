"""Where SGLang is installed, its imports of packages without a build for CPUs find our stubs."""

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.bench.serving import PrivateDaemon

# Only there: other libraries would take the stubs for the packages.
if importlib.util.find_spec("sglang") is not None:
    sys.path.insert(0, str(Path(__file__).parent / "stubs"))
    # Its imports warn, and warnings are errors while tests are collected.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("sglang.test.kits.unified_radix_cache.storage")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateDaemon]:
    """A daemon for a module's tests, which keep apart by the names of their models."""
    with PrivateDaemon(tmp_path_factory.mktemp("daemon"), cpu="96MiB") as running:
        running.start()
        yield running
