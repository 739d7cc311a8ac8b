"""Proves that the checks of doctor tell good machines from bad, and that complaints have advice.

The machine is a set of probes with answers of the test's choosing; one run is on the real one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvstore.cli import build_app
from kvstore.config import DaemonConfig
from kvstore.errors import KVStoreError, PeerUnavailableError
from kvstore.ops.checks import CHECKS, Context, Verdict, check_peers, memory_limit
from kvstore.ops.doctor import examine
from kvstore.ops.probes import UNLIMITED, PathInfo, Probes
from kvstore.ops.transport_checks import TRANSPORT_CHECKS
from kvstore.status import Status
from kvstore.transport import TransportSettings
from kvstore.transport.ucx_library import UcxReport
from tests.ops.fake_daemon import ADDRESS, status

GIB = 1 << 30
CPUINFO = "flags\t: fpu avx2 avx512f sha_ni\n"
THP = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
CLOCK = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
GOOD_FILES = {
    "/proc/cpuinfo": CPUINFO,
    "/proc/self/stat": "1 (x) S",
    "/proc/mounts": "proc /proc proc rw,nosuid 0 0\n",
    "/proc/meminfo": "HugePages_Free:    1024\nHugepagesize:    2048 kB\n",
    "/proc/self/cgroup": "0::/system.slice/kvstore.service\n",
    THP: "always within_size [advise] never deny force",
    CLOCK: "tsc\n",
}


@dataclass
class Machine(Probes):
    """A good machine, but for what a test changes."""

    files: dict[str, str] = field(default_factory=lambda: dict(GOOD_FILES))
    paths: dict[str, PathInfo] = field(
        default_factory=lambda: {
            "/run/kvstore": PathInfo(True, 1000, 0o700),
            "/ssd": PathInfo(True, 1000, 0o700),
        }
    )
    kernel: str = "6.18.1"
    memory: int = 64 * GIB
    limits: Mapping[str, int] = field(
        default_factory=lambda: {"MEMLOCK": UNLIMITED, "NOFILE": 65536}
    )
    uring: str = ""
    direct: str = ""
    memfd: str = ""
    packages: tuple[str, ...] = ("torch", "zstandard", "redis", "cupy")
    answer: Status | KVStoreError = field(default_factory=status)
    movers_there: tuple[tuple[str, ...], dict[str, str]] | str = (("shm", "tcp"), {})
    libraries: Sequence[UcxReport] = ()

    def movers(self, settings: TransportSettings) -> tuple[tuple[str, ...], dict[str, str]] | str:
        return self.movers_there

    def ucx_libraries(self, given: str) -> list[UcxReport]:
        return list(self.libraries)

    def release(self) -> str:
        return self.kernel

    def machine(self) -> str:
        return "x86_64"

    def uid(self) -> int:
        return 1000

    def read(self, path: str) -> str:
        return self.files.get(path, "")

    def exists(self, path: str) -> bool:
        return path in self.files

    def path_info(self, path: Path) -> PathInfo | None:
        return self.paths.get(str(path))

    def memory_bytes(self) -> int:
        return self.memory

    def limit(self, name: str) -> int:
        return self.limits[name]

    def try_uring(self) -> str:
        return self.uring

    def try_direct(self, directory: Path) -> str:
        return self.direct

    def try_memfd(self) -> str:
        return self.memfd

    def package(self, name: str) -> bool:
        return name in self.packages

    def library(self, name: str) -> str:
        return f"lib{name}.so.0"

    def simd_level(self) -> int:
        return 2

    def ask(self, address: str, timeout: float) -> Status | KVStoreError:
        return self.answer


def context(**settings: Any) -> Context:
    chosen = {"listen": "unix:/run/kvstore/kvstore.sock", "ssd": "/ssd", **settings}
    return Context(DaemonConfig(**chosen), "", "1.2.3", ADDRESS)


def levels(machine: Machine, where: Context | None = None) -> dict[str, str]:
    found = examine(machine, where or context())
    for name, verdict in found.items():
        assert (verdict.level == "ok") == (verdict.advice == ""), name
        assert verdict.found, name
    return {name: verdict.level for name, verdict in found.items() if verdict.level != "ok"}


def test_a_good_machine_has_no_complaint() -> None:
    assert levels(Machine()) == {}


@pytest.mark.parametrize(
    ("changes", "name", "level"),
    [
        ({"kernel": "5.4.0"}, "kernel", "warn"),
        ({"kernel": "5.10.0"}, "kernel", "warn"),
        ({"uring": "EPERM"}, "io_uring", "warn"),
        ({"direct": "EINVAL"}, "o_direct", "warn"),
        ({"direct": "EACCES"}, "o_direct", "fail"),
        ({"memory": GIB // 2}, "memory", "fail"),
        ({"memory": GIB + 1000}, "memory", "warn"),
        ({"limits": {"MEMLOCK": 65536, "NOFILE": 65536}}, "memlock", "warn"),
        ({"limits": {"MEMLOCK": UNLIMITED, "NOFILE": 1024}}, "descriptors", "warn"),
        ({"limits": {"MEMLOCK": UNLIMITED, "NOFILE": 64}}, "descriptors", "fail"),
        ({"memfd": "sealing: no"}, "memfd", "fail"),
        ({"answer": PeerUnavailableError("nobody")}, "daemon", "warn"),
        ({"answer": {**status(), "version": "0.9"}}, "daemon", "warn"),
        ({"paths": {"/ssd": PathInfo(True, 1000, 0o700)}}, "socket", "fail"),
        ({"movers_there": "ucx: no libucp found"}, "transports", "fail"),
        ({"libraries": [UcxReport("/lib/libucp.so.0", "system", problem="old")]}, "ucx", "warn"),
    ],
)
def test_a_flaw_is_found(changes: dict[str, Any], name: str, level: str) -> None:
    assert levels(Machine(**changes)) == {name: level}


@pytest.mark.parametrize(
    ("path", "text", "name"),
    [
        ("/proc/cpuinfo", "flags : fpu sse2", "cpu"),
        ("/proc/mounts", "proc /proc proc rw,hidepid=invisible 0 0", "proc"),
        ("/proc/self/stat", "", "proc"),
        (THP, "always [deny] force", "shmem_thp"),
        (THP, "", "shmem_thp"),
        (CLOCK, "hpet", "clock"),
        ("/dev/nvidiactl", "", "gpu"),
    ],
)
def test_a_flaw_that_a_file_tells_of_is_found(path: str, text: str, name: str) -> None:
    machine = Machine()
    machine.files[path] = text
    assert levels(machine) == {name: "warn"}


def test_never_is_good_enough_where_madvise_collapse_is() -> None:
    machine = Machine(kernel="6.1.0")
    machine.files[THP] = "always [never] deny"
    assert levels(machine) == {}
    machine.kernel = "6.0.0"
    assert levels(machine) == {"shmem_thp": "warn"}


@pytest.mark.parametrize(
    ("info", "level"),
    [
        (PathInfo(True, 1000, 0o777), "warn"),
        (PathInfo(True, 5, 0o700), "fail"),
        (PathInfo(False, 1000, 0o700), "fail"),
        (PathInfo(True, 0, 0o1777), ""),
    ],
)
def test_the_directory_of_the_socket_must_be_ours(info: PathInfo, level: str) -> None:
    machine = Machine()
    machine.paths["/run/kvstore"] = info
    assert levels(machine).get("socket", "") == level


def test_the_least_limit_of_the_enclosing_control_groups_counts() -> None:
    machine = Machine()
    machine.files["/sys/fs/cgroup/system.slice/memory.max"] = str(2 * GIB)
    machine.files["/sys/fs/cgroup/system.slice/kvstore.service/memory.max"] = "max\n"
    assert memory_limit(machine) == (2 * GIB, "allowed by the control group")
    machine.files["/sys/fs/cgroup/system.slice/kvstore.service/memory.max"] = str(GIB)
    assert memory_limit(machine)[0] == GIB


def test_reserved_huge_pages_must_hold_the_arena() -> None:
    assert levels(Machine(), context(huge_pages=True, cpu="2GiB")) == {}
    assert levels(Machine(), context(huge_pages=True, cpu="3GiB")) == {"huge_pages": "fail"}


def test_settings_that_need_what_is_not_there_fail() -> None:
    assert levels(Machine(uring="EPERM"), context(ssd_io="uring")) == {"io_uring": "fail"}
    machine = Machine(packages=())
    assert levels(machine, context(codec="zstd")) == {"packages": "fail"}
    assert levels(machine) == {}


def test_wrong_settings_do_not_keep_the_rest_from_being_looked_at() -> None:
    found = examine(Machine(), Context(None, "cpu: 'x' is not a size", "1.2.3"))
    assert found["config"].level == "fail"
    assert "cpu" in found["config"].found
    assert [n for n, v in found.items() if v.level != "ok"] == ["config"]


def test_a_libucp_is_told_with_all_it_has() -> None:
    report = UcxReport("/lib/libucp.so.0", "system", "1.13.1", (("tcp", "eth0"), ("rc", "mlx5_0")))
    found = examine(Machine(libraries=[report]), context())["ucx"].found
    assert found == "/lib/libucp.so.0 (system) 1.13.1: tcp/eth0, rc/mlx5_0"


def test_a_mover_that_does_not_work_here_is_told_with_its_reason() -> None:
    machine = Machine(movers_there=(("shm", "tcp"), {"ucx": "no libucp found"}))
    assert examine(machine, context())["transports"].found == (
        "usable: shm, tcp; not ucx: no libucp found"
    )


def test_a_peer_is_reached_only_with_a_token() -> None:
    where = dataclasses.replace(context(), peer="tcp:10.0.0.2:9471")
    verdict = examine(Machine(), where)["peer"]
    assert (verdict.level, "peer_token" in verdict.found) == ("fail", True)


def test_peers_need_a_secret_that_is_private_and_a_host_that_others_reach(tmp_path: Path) -> None:
    def verdict(**settings: Any) -> Verdict:
        config = DaemonConfig(listen=f"unix:{tmp_path}/s", **settings)
        return check_peers(Probes(), Context(config))

    secret = tmp_path / "peers"
    assert verdict().level == "ok"
    assert verdict(peer_token=str(secret)).level == "fail"
    secret.touch(0o600)
    secret.write_text("x" * 32)
    assert verdict(peer_token=str(secret)).level == "warn"
    assert verdict(peer_token=str(secret), tcp="10.0.0.1:9471").level == "ok"
    assert verdict(peer_token=str(secret), peer_listen="10.0.0.1").level == "ok"
    assert "RDMA" in verdict(peer_token=str(secret), peer_require_rdma=True).found
    secret.chmod(0o644)
    assert verdict(peer_token=str(secret)).level == "fail"


def test_doctor_on_this_machine(tmp_path: Path) -> None:
    shown = CliRunner().invoke(
        build_app([]),
        ["doctor", "--json", "--ssd", str(tmp_path), "--connect", f"unix:{tmp_path}/no.sock"],
    )
    found = json.loads(shown.stdout)
    assert [check["name"] for check in found["checks"]] == [
        name for name, _ in (*CHECKS, *TRANSPORT_CHECKS)
    ]
    assert shown.exit_code == (0 if found["ok"] else 1)
    assert {"name", "level", "found", "advice"} == set(found["checks"][0])


def test_doctor_with_wrong_settings_ends_with_1_and_names_them(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('cpu = "much"\n')
    options = ["doctor", "--config", str(tmp_path / "bad.toml"), "--connect", ADDRESS]
    shown = CliRunner().invoke(build_app([]), options)
    assert shown.exit_code == 1
    assert "cpu" in shown.stdout
    assert "much" in shown.stdout
