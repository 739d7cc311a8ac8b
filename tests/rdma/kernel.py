"""A kernel with soft-RoCE: the distribution's own package, downloaded and unpacked, not installed.

Which version that is, the package index says. Next to it lies an initramfs that we build: busybox,
the modules in the order in which they need each other, and `init.sh`.
"""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# What the newest kernel of a distribution is called, and what is in packages beside it.
_METAPACKAGES = ("linux-image-amd64", "linux-image-generic")
_PACKAGE = re.compile(r"^\s*Depends: (linux-(?:image|modules|modules-extra)-\d\S*)$", re.MULTILINE)
# crc32 is asked for by its name as an algorithm, so no dependency of modules tells of it.
_MODULES = (
    *("9p", "virtio_pci", "9pnet_virtio", "overlay", "virtio_console", "virtio_net", "veth"),
    *("crc32_generic", "crc32_pclmul", "rdma_rxe", "rdma_ucm"),
)
_TOOLS = ("qemu-system-x86_64", "busybox", "modprobe", "depmod", "dpkg", "apt-get", "apt-cache")


class UnavailableError(Exception):
    """Why there can be no guest on this machine."""


@dataclass(frozen=True)
class Kernel:
    image: Path
    initramfs: Path
    version: str


def prepare(directory: Path) -> Kernel:
    """Return the kernel in `directory`, which keeps what was downloaded for the next time.

    Raises:
        UnavailableError: a tool or the package is missing; the message says which.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=_path()) is None]
    if missing:
        raise UnavailableError(f"no {', '.join(missing)} on this machine")
    packages = _packages()
    root = directory / packages[0]
    if not root.is_dir():
        _unpack(packages, directory, root)
    images = sorted((root / "boot").glob("vmlinuz-*"))
    if not images:
        raise UnavailableError(f"{packages[0]} has no kernel image")
    version = images[-1].name.removeprefix("vmlinuz-")
    # Built anew each time: it takes a second, and this file may have changed.
    initramfs = _initramfs(root, version, directory / "initramfs.cpio")
    return Kernel(images[-1], initramfs, version)


def _path() -> str:
    return "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"


def _output(*command: str | Path) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": _path(), "LC_ALL": "C"}, check=False
    )
    if done.returncode != 0:
        raise UnavailableError(f"{command[0]} failed: {done.stderr.strip()[-400:]}")
    return done.stdout


def _packages() -> list[str]:
    """Return the names of the kernel's packages, the image's first."""
    for metapackage in _METAPACKAGES:
        try:
            found = _PACKAGE.findall(_output("apt-cache", "depends", metapackage))
        except UnavailableError:
            continue
        images = [name for name in found if name.startswith("linux-image-")]
        if not images:
            continue
        beside = [name for name in found if name not in images]
        for name in _PACKAGE.findall(_output("apt-cache", "depends", images[0])):
            beside += [name] if name not in beside else []
        return [images[0], *beside]
    raise UnavailableError(f"apt knows no {' or '.join(_METAPACKAGES)}; try apt-get update")


def _unpack(packages: list[str], directory: Path, root: Path) -> None:
    """Download packages and unpack them into `root`, which is there whole or not at all."""
    scratch = directory / "unpacking"
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "root").mkdir(parents=True)
    done = subprocess.run(
        ["apt-get", "-qq", "download", *packages],
        cwd=scratch,
        capture_output=True,
        text=True,
        check=False,
    )
    archives = sorted(scratch.glob("*.deb"))
    if len(archives) != len(packages):
        raise UnavailableError(f"cannot download {packages}: {done.stderr.strip()[-400:]}")
    for archive in archives:
        _output("dpkg", "-x", archive, scratch / "root")
        archive.unlink()
    (scratch / "root").rename(root)
    scratch.rmdir()


def _initramfs(root: Path, version: str, made: Path) -> Path:
    tree = made.with_suffix(".tree")
    shutil.rmtree(tree, ignore_errors=True)
    for name in ("bin", "modules", "proc", "sys", "dev", "host", "overlay", "root"):
        (tree / name).mkdir(parents=True)
    busybox = shutil.which("busybox", path=_path())
    assert busybox is not None
    shutil.copy(busybox, tree / "bin/busybox")
    shutil.copy(Path(__file__).with_name("init.sh"), tree / "init")
    (tree / "init").chmod(0o755)
    order = []
    for module in _module_files(root, version):
        name = module.name.split(".")[0] + ".ko"
        (tree / "modules" / name).write_bytes(_module_bytes(module))
        order.append(name)
    (tree / "modules/order").write_text("".join(f"{name}\n" for name in order))
    names = "".join(f"{path.relative_to(tree)}\n" for path in sorted(tree.rglob("*")))
    with open(made, "wb") as file:
        done = subprocess.run(
            [busybox, "cpio", "-o", "-H", "newc"],
            input=names.encode(),
            stdout=file,
            stderr=subprocess.PIPE,
            cwd=tree,
            check=False,
        )
    if done.returncode != 0:
        raise UnavailableError(f"cannot pack the initramfs: {done.stderr.decode()[-400:]}")
    shutil.rmtree(tree)
    return made


def _module_files(root: Path, version: str) -> list[Path]:
    """Return modules, each after those that it needs; what is built into the kernel is left out."""
    _output("depmod", "-b", root, version)
    order: list[Path] = []
    for module in _MODULES:
        shown = _output("modprobe", "-d", root, "-S", version, "--show-depends", module)
        for line in shown.splitlines():
            kind, _, rest = line.partition(" ")
            path = Path(rest.split(" ")[0])
            if kind == "insmod" and path not in order:
                order.append(path)
    return order


def _module_bytes(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        done = subprocess.run(["zstd", "-dcq", path], capture_output=True, check=False)
        if done.returncode != 0:
            raise UnavailableError(f"zstd cannot unpack {path.name}")
        return done.stdout
    return path.read_bytes()
