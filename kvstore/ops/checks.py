"""The checks of `doctor`: each a function of probes and settings to a verdict, in the table CHECKS.

A verdict says what was found and, unless it is fine, what to do. `fail` is for what keeps a daemon
with these settings from working; `warn` for what makes it slower, weaker or shorter of memory than
it could be.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvstore.address import is_loopback
from kvstore.auth import read_secret
from kvstore.config import DaemonConfig, format_bytes, parse_bytes
from kvstore.errors import KVStoreError
from kvstore.ops.probes import UNLIMITED, PathInfo, Probes

Level = Literal["ok", "warn", "fail"]

_KERNEL_MIN = (5, 6)  # io_uring's reads and writes
_KERNEL_GOOD = (5, 15)
_KERNEL_COLLAPSE = (6, 1)
_SPARE_BYTES = 1 << 30  # for index, Python and clients beside the arena
_RECORD_BYTES = 256  # of LMDB file a block: a record of 116 bytes in pages about half full
_BLOCK_BYTES = 64 << 10  # a small block: the most records that a capacity is likely to hold
_DESCRIPTORS_MIN, _DESCRIPTORS_GOOD = 256, 4096
_SLOW_CLOCKS = {"hpet", "acpi_pm", "jiffies", "refined-jiffies"}
_SIMD = {0: "scalar", 1: "AVX2", 2: "AVX-512"}


@dataclass(frozen=True)
class Verdict:
    level: Level
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Context:
    """What is asked for: settings (None: they are wrong, `config_error` says how) and version."""

    config: DaemonConfig | None
    config_error: str = ""
    version: str = ""
    address: str = ""
    timeout: float = 1.0
    peer: str = ""  # a daemon to be reached

    @property
    def ssd(self) -> str:
        return self.config.ssd if self.config else ""


Run = Callable[[Probes, Context], Verdict]


def ok(found: str) -> Verdict:
    return Verdict("ok", found)


def warn(found: str, advice: str) -> Verdict:
    return Verdict("warn", found, advice)


def fail(found: str, advice: str) -> Verdict:
    return Verdict("fail", found, advice)


def check_config(_: Probes, context: Context) -> Verdict:
    if context.config is None:
        return fail(context.config_error, "correct the setting that is named")
    return ok("settings are valid")


def _kernel(probes: Probes) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", probes.release())
    return (int(match[1]), int(match[2])) if match else (0, 0)


def check_kernel(probes: Probes, _: Context) -> Verdict:
    release, version = probes.release(), _kernel(probes)
    if version < _KERNEL_MIN:
        return warn(f"Linux {release}", "5.6 or later has io_uring; I/O uses threads until then")
    if version < _KERNEL_GOOD:
        return warn(f"Linux {release}", "5.15 or later is what this is tested on")
    return ok(f"Linux {release}")


def check_uring(probes: Probes, context: Context) -> Verdict:
    why = probes.try_uring()
    if not why:
        return ok("usable")
    if context.config is not None and context.config.ssd_io == "uring" and context.ssd:
        return fail(
            why, 'allow io_uring (seccomp, kernel.io_uring_disabled) or set ssd_io = "auto"'
        )
    return warn(
        why,
        "the ssd tier uses threads; in a container allow io_uring_setup, io_uring_enter and "
        "io_uring_register in its seccomp profile, and see kernel.io_uring_disabled",
    )


def check_direct(probes: Probes, context: Context) -> Verdict:
    if not context.ssd:
        return ok("no ssd tier is set")
    directory = Path(context.ssd)
    if probes.path_info(directory) is None:
        directory = directory.parent
    info = probes.path_info(directory)
    if info is None or not info.is_dir:
        return fail(f"{directory} is not a directory", "create it, or set `ssd` to one that is")
    why = probes.try_direct(directory)
    if not why:
        return ok(f"{directory} takes O_DIRECT")
    if why in ("EACCES", "EPERM", "EROFS"):
        return fail(f"{directory}: {why}", "give a directory that this user can write to")
    return warn(
        f"{directory}: {why}",
        "reads go through the page cache then, and take its memory; ext4 and xfs have O_DIRECT",
    )


def _own_groups(probes: Probes) -> list[str]:
    """This process's control groups of version 2, the innermost first."""
    for line in probes.read("/proc/self/cgroup").splitlines():
        number, _, path = line.partition(":")
        if number == "0":
            parts = [part for part in path.removeprefix(":").split("/") if part]
            return ["/".join(parts[:end]) for end in range(len(parts), -1, -1)]
    return [""]


def memory_limit(probes: Probes) -> tuple[int, str]:
    """The least of memory and the limits of control groups, and which it is."""
    least, what = probes.memory_bytes(), "of memory"
    files = [f"/sys/fs/cgroup/{group}/memory.max" for group in _own_groups(probes)]
    files.append("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    for file in files:
        text = probes.read(file.replace("//", "/")).strip()
        if text.isdigit() and int(text) < least:
            least, what = int(text), "allowed by the control group"
    return least, what


def check_memory(probes: Probes, context: Context) -> Verdict:
    least, what = memory_limit(probes)
    if context.config is None:
        return ok(f"{format_bytes(least)} {what}")
    wanted = context.config.cpu_bytes
    found = f"cpu = {format_bytes(wanted)} of {format_bytes(least)} {what}"
    if wanted > least:
        return fail(found, "the arena is taken at start: lower `cpu` or raise the limit")
    if wanted + min(_SPARE_BYTES, least // 10) > least:
        return warn(found, "leave room for the index and for the engines: lower `cpu`")
    return ok(found)


def check_memlock(probes: Probes, context: Context) -> Verdict:
    soft = probes.limit("MEMLOCK")
    if not context.ssd or context.config is None:
        return ok("no ssd tier is set")
    needed = parse_bytes(context.config.ssd_capacity) // _BLOCK_BYTES * _RECORD_BYTES
    if soft == UNLIMITED:
        return ok("unlimited")
    found = f"{format_bytes(soft)}; an index of this capacity has up to {format_bytes(needed)}"
    if soft < needed:
        return warn(
            found,
            "a page of the index that cannot be read back ends the daemon unless it is locked in "
            f"memory: set LimitMEMLOCK={needed} (systemd) or ulimit -l",
        )
    return ok(found)


def check_descriptors(probes: Probes, _: Context) -> Verdict:
    soft = probes.limit("NOFILE")
    if soft == UNLIMITED or soft >= _DESCRIPTORS_GOOD:
        return ok("unlimited" if soft == UNLIMITED else str(soft))
    advice = "set LimitNOFILE=16384 (systemd) or ulimit -n"
    return (fail if soft < _DESCRIPTORS_MIN else warn)(f"{soft} files and sockets", advice)


def _meminfo(probes: Probes, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+)", probes.read("/proc/meminfo"), re.MULTILINE)
    return int(match[1]) if match else 0


def check_huge_pages(probes: Probes, context: Context) -> Verdict:
    page = _meminfo(probes, "Hugepagesize") * 1024
    free = _meminfo(probes, "HugePages_Free") * page
    if context.config is None or not context.config.huge_pages:
        return ok(f"not asked for; {format_bytes(free)} reserved and free")
    wanted = context.config.cpu_bytes
    if free < wanted:
        pages = -(-wanted // page) if page else 0
        return fail(
            f"{format_bytes(free)} free, cpu = {format_bytes(wanted)}",
            f"sysctl vm.nr_hugepages={pages} before the start, or huge_pages = false",
        )
    return ok(f"{format_bytes(free)} free for cpu = {format_bytes(wanted)}")


def check_shmem_thp(probes: Probes, context: Context) -> Verdict:
    path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    chosen = re.search(r"\[(\w+)\]", probes.read(path))
    if context.config is not None and context.config.huge_pages:
        return ok("not needed: reserved huge pages are used")
    if chosen is None:
        return warn("this kernel has none", "set huge_pages = true and reserve huge pages")
    # From 6.1 on the arena asks for huge pages by MADV_COLLAPSE, which only "deny" refuses.
    refused = ("deny",) if _kernel(probes) >= _KERNEL_COLLAPSE else ("never", "deny")
    if chosen[1] in refused:
        return warn(
            chosen[1],
            f"the arena may stay on 4 KiB pages: echo advise > {path}, or reserve huge pages",
        )
    return ok(chosen[1])


def check_cpu(probes: Probes, _: Context) -> Verdict:
    flags = set(re.findall(r"\S+", probes.read("/proc/cpuinfo").lower()))
    has = [name for name in ("avx2", "avx512f", "sha_ni", "sha2") if name in flags]
    level = _SIMD.get(probes.simd_level(), str(probes.simd_level()))
    found = f"{probes.machine()}: {', '.join(has) or 'no extensions that are used'}; uses {level}"
    if probes.machine() in ("x86_64", "AMD64") and "avx2" not in has:
        return warn(found, "copies, checksums and hashes are several times slower without AVX2")
    return ok(found)


def check_memfd(probes: Probes, _: Context) -> Verdict:
    why = probes.try_memfd()
    if why:
        return fail(why, "the arena needs memfd_create with F_SEAL_FUTURE_WRITE (Linux 5.1)")
    return ok("can be sealed")


def check_proc(probes: Probes, _: Context) -> Verdict:
    if not probes.read("/proc/self/stat"):
        return warn("/proc is not there", "mount it: a dead writer's slots are found by its pid")
    for line in probes.read("/proc/mounts").splitlines():
        fields = line.split()
        if len(fields) > 3 and fields[2] == "proc" and fields[1] == "/proc":
            match = re.search(r"hidepid=(\w+)", fields[3])
            if match and match[1] not in ("0", "off"):
                return warn(
                    f"mounted with hidepid={match[1]}",
                    "writers of other users are not seen; slots they left wait until they answer",
                )
    return ok("processes are visible")


def check_socket(probes: Probes, context: Context) -> Verdict:
    if context.config is None:
        return ok("not looked at: the settings are wrong")
    directory = context.config.socket_path.parent
    info = probes.path_info(directory)
    if info is None:
        if probes.path_info(directory.parent) is None:
            return fail(f"{directory.parent} is not there", "create it, or set `listen`")
        return ok(f"{directory} is made at the start")
    return _judged(probes, directory, info)


def _judged(probes: Probes, directory: Path, info: PathInfo) -> Verdict:
    if not info.is_dir:
        return fail(f"{directory} is not a directory", "set `listen` to another path")
    if info.uid not in (probes.uid(), 0):
        return fail(
            f"{directory} belongs to user {info.uid}", "set `listen` to a directory of ours"
        )
    if info.mode & 0o022 and not info.mode & 0o1000:
        return warn(
            f"{directory} has mode {info.mode:04o}",
            f"others could put their socket in place of ours: chmod 0700 {directory}",
        )
    return ok(f"{directory}, mode {info.mode:04o}")


def check_clock(probes: Probes, _: Context) -> Verdict:
    path = "/sys/devices/system/clocksource/clocksource0/"
    clock = probes.read(path + "current_clocksource").strip()
    if clock in _SLOW_CLOCKS:
        others = probes.read(path + "available_clocksource").strip()
        return warn(clock, f"each look at it costs a microsecond; there are: {others}")
    return ok(clock or "unknown")


def check_daemon(probes: Probes, context: Context) -> Verdict:
    if not context.address:
        return ok("not looked at: the settings are wrong")
    answer = probes.ask(context.address, context.timeout)
    if isinstance(answer, KVStoreError):
        return warn(str(answer), "kvstore serve starts one")
    version = str(answer.get("version"))
    if context.version and version != context.version:
        return warn(
            f"{context.address} runs {version}, this is {context.version}",
            "kvstore restart changes it to the installed one, with its DRAM content",
        )
    state = str(answer.get("state"))
    return ok(f"{context.address}, {version}, {state}")


def check_peers(_: Probes, context: Context) -> Verdict:
    config = context.config
    if config is None or not config.peer_token:
        return ok("no blocks are fetched from other daemons, or served to them: no peer_token")
    try:
        read_secret(config.peer_token, "peer_token")
    except KVStoreError as error:
        return fail(str(error), "make a file with 16 random bytes or more, and mode 0600")
    ways = ", ".join(config.mover_names)
    if config.peer_require_rdma:
        return ok(f"by {ways}, between hosts over RDMA only; peers read at {config.peer_host}")
    found = f"by {ways}; peers read at {config.peer_host}"
    if is_loopback(config.peer_host):
        return warn(found, "other hosts cannot reach it: set `tcp`, or `peer_listen`")
    return ok(found)


def check_packages(probes: Probes, context: Context) -> Verdict:
    names = ("torch", "zstandard", "redis", "cupy")
    has = [name for name in names if probes.package(name)]
    ucx = probes.library("ucp")
    found = f"found: {', '.join([*has, *([ucx] if ucx else [])]) or 'none'}"
    missing = [name for name in names if name not in has] + ([] if ucx else ["UCX (libucp)"])
    if missing:
        found += f"; not: {', '.join(missing)}"
    if context.config is not None and context.config.codec == "zstd" and "zstandard" not in has:
        return fail(found, "codec = \"zstd\" needs zstandard: pip install 'kvstore-llm[zstd]'")
    return ok(found)


def check_gpu(probes: Probes, _: Context) -> Verdict:
    version = re.search(r"Kernel Module\D*([\d.]+)", probes.read("/proc/driver/nvidia/version"))
    if version:
        return ok(f"NVIDIA driver {version[1]}")
    if probes.exists("/dev/nvidiactl"):
        return warn("NVIDIA device without a driver's version", "is the driver loaded?")
    return ok("none: the cpu and ssd tiers need none")


CHECKS: tuple[tuple[str, Run], ...] = (
    ("config", check_config),
    ("kernel", check_kernel),
    ("io_uring", check_uring),
    ("o_direct", check_direct),
    ("memory", check_memory),
    ("memlock", check_memlock),
    ("descriptors", check_descriptors),
    ("huge_pages", check_huge_pages),
    ("shmem_thp", check_shmem_thp),
    ("cpu", check_cpu),
    ("memfd", check_memfd),
    ("proc", check_proc),
    ("socket", check_socket),
    ("clock", check_clock),
    ("daemon", check_daemon),
    ("peers", check_peers),
    ("packages", check_packages),
    ("gpu", check_gpu),
)
