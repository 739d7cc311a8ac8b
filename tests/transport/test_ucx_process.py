"""UCX is found at run time, or it is said clearly why not; it leaves the process as it was, and
uses the devices that it should."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kvstore import ConfigError, IncompatibleError
from kvstore.transport import Endpoint, TransportSettings, ucx_devices, ucx_library
from kvstore.transport.ucx import UcxMover
from tests.transport.ucx_support import ROOT, SECRET, library, run_python

# --- the process


def test_a_process_is_left_as_it_was() -> None:
    """UCX takes over fatal signals and prints what goes wrong to standard output."""
    found = library()
    code = """
        import sys
        import numpy as np
        from kvstore import _native
        def caught():
            return [line for line in open("/proc/self/status") if line.startswith(("SigC", "SigI"))]
        before = caught()
        path, modules = sys.argv[1:]
        def make(epoch):
            return _native.UcxContext(path, "tcp", "lo", 1.0, b"s" * 32, epoch, modules=modules)
        server, client = make(1), make(2)
        address = server.address()
        link = client.connect(address, 1, b"s" * 32, 5.0)
        server.close()
        while link.is_alive():
            pass
        try:
            client.connect(address, 1, b"s" * 32, 5.0)
        except ConnectionError:
            pass
        assert caught() == before
        if sys.stdin.readline() == "close":
            client.close()
    """
    for how in ("close", "leave it open"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), found.path, found.allowed_modules],
            cwd=ROOT,
            input=how,
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- libraries


OPEN = """
    import sys
    from kvstore import _native
    for path in sys.argv[1:]:
        try:
            _native.UcxContext(path, "tcp", "lo", 1.0, b"s" * 32, 1)
        except RuntimeError as error:
            print(error)
"""


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"/no/libucp.so.0: no such file"):
        UcxMover(TransportSettings(ucx_library="/no/libucp.so.0"), SECRET, 1)
    monkeypatch.setenv("KVSTORE_UCX_LIB", "/nowhere/libucp.so")
    with pytest.raises(ConfigError, match=r"/nowhere/libucp.so: no such file"):
        UcxMover(TransportSettings(), SECRET, 1)
    assert [c.origin for c in ucx_library.candidates()] == ["environment"], "and no other is taken"
    assert ucx_library.probe(ucx_library.candidates()[0]).problem == "no such file"


def test_no_library_at_all_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVSTORE_UCX_LIB", raising=False)
    monkeypatch.setattr(ucx_library, "candidates", lambda given: [])
    with pytest.raises(IncompatibleError, match="libucx-cu12"):
        UcxMover(TransportSettings(), SECRET, 1)


def test_a_library_that_is_none_or_too_old_is_named(tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("not a library")
    paths = [text]
    compiler = next((c for c in ("/usr/bin/cc", "/usr/bin/gcc") if Path(c).exists()), None)
    if compiler is not None:
        for name, source in (
            ("foreign", "int nothing;"),
            (
                "old",
                "void ucp_get_version(unsigned *a, unsigned *b, unsigned *c)"
                "{ *a = 1; *b = 12; *c = 3; }",
            ),
        ):
            path = tmp_path / f"{name}.so"
            command = [compiler, "-shared", "-fPIC", "-xc", "-", "-o", str(path)]
            subprocess.run(command, input=source, text=True, check=True)
            paths.append(path)
    done = run_python(OPEN, *map(str, paths))
    said = done.stdout.splitlines()
    assert said[0].startswith(f"{text}: ")
    assert "file too short" in said[0] or "invalid ELF" in said[0]
    if compiler is not None:
        assert said[1] == f"{paths[1]}: not a libucp of 1.13 or later: no ucp_get_version"
        assert said[2] == f"{paths[2]}: version 1.12.3; needed is 1.13 or a later 1.x"


def test_a_process_has_one_library(tmp_path: Path) -> None:
    real = library().path
    other = tmp_path / "libucp.so.0"
    other.write_bytes(b"")
    done = run_python(OPEN, real, str(other))
    assert done.stdout == f"{other}: this process already uses {real}\n", done.stderr


def test_wrong_settings_are_named() -> None:
    path = library().path
    code = """
        import sys
        from kvstore import _native
        for arguments in (("nonsense", "lo"), ("tcp", "no_such_device")):
            try:
                _native.UcxContext(sys.argv[1], *arguments, 1.0, b"s" * 32, 1)
            except RuntimeError as error:
                print(error)
    """
    done = run_python(code, path)
    for line, wrong in zip(done.stdout.splitlines(), ("nonsense", "no_such_device"), strict=True):
        assert line.startswith(f"{path}: "), done.stderr
        assert wrong in line


def test_a_found_library_is_probed_in_another_process() -> None:
    report = ucx_library.probe(library())
    assert report.problem == ""
    assert report.version.startswith("1.")
    assert ("tcp", "lo") in report.transports


def test_libraries_are_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    system, plain = tmp_path / "system", tmp_path / "plain"
    site = tmp_path / "site"
    touch(system / "libucp.so.0")
    touch(system / "ucx" / "libuct_ib.so.0")
    touch(plain / "libucp.so.0")
    nixl = touch(site / "nixl_cu12.libs" / "libucp-1234.so.0.0.0")
    touch(nixl.parent / "ucx" / "libuct_ib_efa.so.0.0.0")
    touch(site / "libucx" / "__init__.py")
    wheel = touch(site / "libucx" / "lib" / "libucp.so.0")
    monkeypatch.setattr(ucx_library, "_SYSTEM_DIRECTORIES", (str(plain), str(system)))
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: None)
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.delitem(sys.modules, "libucx", raising=False)
    monkeypatch.delenv("KVSTORE_UCX_LIB", raising=False)
    found = ucx_library.candidates()
    wanted = [system / "libucp.so.0", nixl, wheel, plain / "libucp.so.0"]
    assert [library.path for library in found] == [str(path) for path in wanted]
    assert [library.has_verbs for library in found] == [True, False, False, False]
    assert [library.allowed_modules for library in found] == ["", "^efa", "", ""]


# --- devices


def rdma(root: Path, device: str, state: str, interface: str) -> None:
    port = root / device / "ports" / "1"
    (port / "gid_attrs" / "ndevs").mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    (port / "gid_attrs" / "ndevs" / "0").write_text(f"{interface}\n")


def test_rdma_is_used_where_the_library_and_a_port_that_is_up_have_it(tmp_path: Path) -> None:
    rdma(tmp_path, "mlx5_0", "4: ACTIVE", "lo")
    rdma(tmp_path, "mlx5_1", "1: DOWN", "lo")
    ports = ucx_devices.rdma_ports(tmp_path)
    assert [port.name for port in ports] == ["mlx5_0:1"]

    def choose(listen: str, tls: str = "", devices: str = "", verbs: bool = True) -> object:
        return ucx_devices.choose(listen, tls, devices, verbs, ports)

    devices = ucx_devices.UcxDevices
    assert choose("0.0.0.0") == devices("ib", "mlx5_0:1", True)
    assert choose("0.0.0.0", verbs=False) == devices("tcp", "", False)
    assert choose("127.0.0.1:7000") == devices("tcp", "lo", False), "loopback is no network"
    assert choose("0.0.0.0", "tcp") == devices("tcp", "", False)
    assert choose("0.0.0.0", "", "mlx5_0:1") == devices("ib", "mlx5_0:1", True)
    assert choose("0.0.0.0", "", "eth0") == devices("tcp", "eth0", False)
    assert choose("0.0.0.0", "rc,ud") == devices("rc,ud", "", True)
    with pytest.raises(ConfigError, match="listen"):
        choose("203.0.113.77")


def test_without_rdma_ucx_is_used_only_when_asked_for() -> None:
    library()
    if ucx_devices.rdma_ports():
        pytest.skip("this machine has RDMA")
    with Endpoint(TransportSettings()) as endpoint:
        assert "ucx" not in endpoint.movers
        assert "no RDMA" in endpoint.unavailable["ucx"]
