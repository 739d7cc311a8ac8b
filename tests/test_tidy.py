"""House rules that a machine can check. Each failure says what to do instead."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from inspect import ismodule
from pathlib import Path

import pytest

import kvstore
from kvstore.metrics import metrics_page

ROOT = Path(__file__).parents[1]
PYTHON = sorted(
    path
    for part in ("kvstore", "adapters", "bench", "examples", "tests")
    for path in (ROOT / part).rglob("*.py")
)
NATIVE = sorted(p for suffix in ("*.h", "*.cc", "*.cu") for p in (ROOT / "csrc").rglob(suffix))
SHIPPED = [path for path in PYTHON if path.parts[len(ROOT.parts)] in ("kvstore", "adapters")]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PYTHON + NATIVE, ids=relative)
def test_no_leftovers(path: Path) -> None:
    # Written so that this line is not one itself.
    found = re.search(r"FIX[M]E|XX[X]|HAC[K]|TOD[O]\b|breakpoin[t]\(", path.read_text())
    assert found is None, f"{path}: leftover {found.group()}, remove before merge" if found else ""


def test_core_knows_neither_python_nor_cuda() -> None:
    for path in (ROOT / "csrc" / "core").iterdir():
        text = path.read_text()
        assert "pybind11" not in text, f"{path}: bindings belong in csrc/python"
        assert "cuda_runtime" not in text, f"{path}: CUDA belongs in csrc/cuda"


def test_headers_of_the_core_include_only_the_core() -> None:
    for path in (ROOT / "csrc" / "core").iterdir():
        for included in re.findall(r'#include "([^"]+)"', path.read_text()):
            assert included.startswith("core/"), f"{path}: {included} is not below csrc/core"


def test_native_code_gets_its_settings_as_arguments() -> None:
    for path in NATIVE:
        assert "getenv" not in path.read_text(), f"{path}: pass it in; see kvstore/config.py"


def test_native_code_has_no_assert_that_a_release_build_could_drop() -> None:
    for path in NATIVE:
        assert not re.search(r"(?<!static_)\bassert\(", path.read_text()), f"{path}: use KV_CHECK"


def test_public_names_are_exactly_the_exported_ones() -> None:
    public = {n for n, v in vars(kvstore).items() if not n.startswith("_") and not ismodule(v)}
    assert public == set(kvstore.__all__)
    assert kvstore.__all__ == sorted(kvstore.__all__)


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


# vLLM hashes a pickle of its keys: kvstore.hashing makes the same bytes, and never reads any.
PICKLING = {"kvstore/hashing.py"}


def test_nothing_is_unpickled() -> None:
    banned = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle"}
    for path in SHIPPED:
        found = {name.split(".")[0] for name in imports_of(path)} & banned
        if relative(path) in PICKLING:
            text = path.read_text()
            assert "pickle.load" not in text, f"{path}: may write pickles, not read them"
            assert "Unpickler" not in text, f"{path}: may write pickles, not read them"
        else:
            assert not found, f"{path}: imports {found}; bytes of others must not become code"


def test_the_library_imports_no_adapter_and_no_engine() -> None:
    banned = {"kvstore_adapters", "torch", "vllm", "sglang", "transformers"}
    for path in SHIPPED:
        if relative(path).startswith("kvstore/"):
            found = {name.split(".")[0] for name in imports_of(path)} & banned
            assert not found, f"{path}: imports {found}; that belongs in adapters/"
            if relative(path) != "kvstore/gpu/modules.py":
                assert "cupy" not in {name.split(".")[0] for name in imports_of(path)}, path


def test_importing_kvstore_takes_no_heavy_modules() -> None:
    heavy = ("torch", "asyncio", "typer", "rich", "matplotlib", "pydantic", "zstandard", "cupy")
    script = f"import sys, kvstore; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]", "import it in the function that needs it"


def test_importing_kvstore_changes_nothing_global() -> None:
    script = (
        "import logging, os, signal, threading, sys\n"
        "def state():\n"
        "    return (dict(os.environ), [signal.getsignal(s) for s in signal.valid_signals()\n"
        "            if s not in (signal.SIGKILL, signal.SIGSTOP)], threading.active_count(),\n"
        "            logging.root.handlers[:], sys.excepthook, os.umask(os.umask(0o22)))\n"
        "import numpy\n"
        "before = state()\n"
        "import kvstore\n"
        "assert state() == before\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_the_page_of_metrics_is_up_to_date() -> None:
    page = (ROOT / "docs" / "METRICS.md").read_text()
    assert page == metrics_page(), (
        "run: python -c 'import kvstore.metrics as m; print(m.metrics_page(), end=\"\")'"
        " > docs/METRICS.md"
    )


def test_the_package_is_typed_and_licensed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '"py.typed"' in text
    assert '"*.pyi"' in text
    assert 'license-files = ["LICENSE"]' in text
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert (ROOT / "kvstore" / "py.typed").exists()
    assert (ROOT / "kvstore" / "_native.pyi").exists()


def test_every_package_is_shipped() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for init in ROOT.glob("kvstore/**/__init__.py"):
        name = ".".join(init.parent.relative_to(ROOT).parts)
        assert f'"{name}"' in text, f"{name}: add it to packages in pyproject.toml"
    for init in (ROOT / "adapters").glob("**/__init__.py"):
        name = ".".join(init.parent.relative_to(ROOT / "adapters").parts)
        assert f'"{name}"' in text, f"{name}: add it to packages in pyproject.toml"
