"""Where a libucp is looked for, and what each one found can do.

UCX is no part of a build: what is on the machine is loaded at run time. In order: the one that is
named (setting, or $KVSTORE_UCX_LIB), and then no other; the system's, if it was built with verbs;
the one inside the NIXL wheel, which was; the `libucx-cu1x` wheel, which moves by TCP only; at last
the system's without verbs. A process loads one.

    python -m kvstore.transport.ucx_library      what there is and what each can, as JSON
"""

from __future__ import annotations

import importlib.util
import json
import secrets
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from kvstore import _native
from kvstore.config_sources import ucx_library_from_environment
from kvstore.errors import ConfigError, IncompatibleError

_MODULE = "kvstore.transport.ucx_library"  # also where it runs as __main__
_PROBE_SECONDS = 20.0
_SYSTEM_DIRECTORIES = (
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib64",
    "/usr/local/lib",
    "/opt/ucx/lib",
    "/opt/hpcx/ucx/lib",
)


@dataclass(frozen=True, slots=True)
class UcxLibrary:
    """A libucp that was found, not loaded.

    `origin`: "setting", "environment", "system", "nixl" or "wheel". `modules`: its optional parts,
    such as "ib" and "cuda". `problem`: why it is of no use; "" where nothing is known yet.
    """

    path: str
    origin: str
    modules: tuple[str, ...] = ()
    problem: str = ""

    @property
    def has_verbs(self) -> bool:
        return "ib" in self.modules

    @property
    def allowed_modules(self) -> str:
        """What to set UCX_MODULES to; "": as it is.

        NIXL's wheel has a module for EFA without the library that it needs. It takes the system's,
        which brings second copies of libibverbs and libnl, and the process crashes when it exits.
        """
        directory = Path(self.path).parent
        is_wheel = directory.name.startswith("nixl_cu")
        return "^efa" if is_wheel and not any(directory.glob("libefa*")) else ""


@dataclass(frozen=True, slots=True)
class UcxReport:
    """What a libucp said of itself, loaded in a process of its own.

    `transports`: pairs of transport and device. `problem`: why it cannot be used; "" where it can.
    """

    path: str
    origin: str
    version: str = ""
    transports: tuple[tuple[str, str], ...] = ()
    problem: str = ""


def _described(path: Path, origin: str) -> UcxLibrary:
    if not path.exists():
        return UcxLibrary(str(path), origin, (), "no such file")
    real = path.resolve()
    modules = {
        name.removeprefix("libuct_").split(".")[0]
        for found in real.parent.glob("ucx/libuct_*.so*")
        for name in (found.name,)
    }
    return UcxLibrary(str(real), origin, tuple(sorted(modules)))


def _system() -> Iterator[UcxLibrary]:
    multiarch = sysconfig.get_config_var("MULTIARCH")
    directories = (*((f"/usr/lib/{multiarch}",) if multiarch else ()), *_SYSTEM_DIRECTORIES)
    seen = set()
    for directory in directories:
        path = Path(directory, "libucp.so.0")
        if path.exists() and path.resolve() not in seen:
            seen.add(path.resolve())
            yield _described(path, "system")


def _nixl() -> Iterator[UcxLibrary]:
    for directory in sys.path:
        for path in sorted(Path(directory or ".").glob("nixl_cu*.libs/libucp-*.so*")):
            yield _described(path, "nixl")


def _wheel() -> Iterator[UcxLibrary]:
    spec = importlib.util.find_spec("libucx")
    for directory in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(directory, "lib", "libucp.so.0")
        if path.exists():
            yield _described(path, "wheel")


def candidates(given: str = "") -> list[UcxLibrary]:
    """Return what there is, best first; where one is named, only that."""
    named = ucx_library_from_environment()
    if given or named:
        return [_described(Path(given or named), "setting" if given else "environment")]
    system = list(_system())
    with_verbs = [library for library in system if library.has_verbs]
    without = [library for library in system if not library.has_verbs]
    return [*with_verbs, *_nixl(), *_wheel(), *without]


def find(given: str = "") -> UcxLibrary:
    """Return the libucp to use.

    Raises:
        ConfigError: the one that is named is not there.
        IncompatibleError: there is none.
    """
    found = candidates(given)
    if not found:
        raise IncompatibleError(
            "ucx: no libucp found: neither the system's, nor one inside the NIXL wheel, nor "
            "libucx-cu12 or libucx-cu13; $KVSTORE_UCX_LIB names one"
        )
    if found[0].problem:
        raise ConfigError(f"ucx_library: {found[0].path}: {found[0].problem}")
    return found[0]


def probe(library: UcxLibrary) -> UcxReport:
    """Load a libucp in another process, since this one can load only one, and ask it."""
    if library.problem:
        return UcxReport(library.path, library.origin, problem=library.problem)
    command = [sys.executable, "-m", _MODULE, library.path, library.allowed_modules]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_PROBE_SECONDS, check=False, text=True
        )
        said = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        said = {"problem": f"no answer in {_PROBE_SECONDS:.0f} s"}
    except ValueError:
        said = {"problem": f"ended with {done.returncode}: {done.stderr[-200:].strip()}"}
    return UcxReport(
        library.path,
        library.origin,
        said.get("version", ""),
        tuple((transport, device) for transport, device in said.get("transports", ())),
        said.get("problem", ""),
    )


def _ask(path: str, modules: str) -> dict[str, object]:
    secret = secrets.token_bytes(32)
    try:
        context = _native.UcxContext(path, "all", "", 2.0, secret, 1, modules=modules)
        version, transports = context.version, context.transports()
        context.close()
    except RuntimeError as error:
        return {"problem": str(error).removeprefix(f"{path}: ")}
    return {"version": version, "transports": transports}


def main(arguments: list[str]) -> None:
    if arguments:
        sys.stdout.write(json.dumps(_ask(arguments[0], *arguments[1:2] or ("",))))
    else:
        reports = [asdict(probe(library)) for library in candidates()]
        sys.stdout.write(json.dumps(reports, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
