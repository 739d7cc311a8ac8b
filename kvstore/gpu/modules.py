"""The copy kernels as machine code for one GPU: compiled by NVRTC at first use, kept on disk.

NVRTC is reached through CuPy, which finds it wherever it was installed; nothing else of CuPy is
needed. Compiling takes a second or less, so the cache is a convenience, and code that somebody else
could have written is never loaded: a cache that is not ours alone, or a file whose digest differs,
is left aside, and compiled anew.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Final

from kvstore.config_sources import cache_directory
from kvstore.errors import GpuError

SOURCE: Final = "block_copy.cu"
HEADERS: Final = ("piece_index.h",)
WIDTHS: Final = (16, 8, 4, 2, 1)
KERNELS: Final = tuple(f"kv_{kind}_{width}" for kind in ("gather", "scatter") for width in WIDTHS)
_OPTIONS: Final = ("-std=c++17",)
_DIGEST_BYTES: Final = 32
_IMAGE_BYTES_MAX: Final = 16 << 20

Compiler = Callable[[int], bytes]  # compute capability, as 90, to an image for cuModuleLoadData


def kernel_directory() -> Path:
    """Return where the kernels' sources are: beside this file when installed, else in csrc/cuda.

    Raises:
        GpuError: they are missing.
    """
    here = Path(__file__).resolve()
    for path in (here.parent / "kernels", here.parents[2] / "csrc" / "cuda"):
        if (path / SOURCE).is_file():
            return path
    raise GpuError(f"the kernels' sources are missing: no {SOURCE} in {here.parent / 'kernels'}")


def nvrtc() -> ModuleType:
    """Return CuPy's binding of NVRTC.

    Raises:
        GpuError: CuPy is not installed, or finds no NVRTC.
    """
    try:
        from cupy.cuda import nvrtc as binding
    except ImportError as error:
        raise GpuError(
            f"CuPy is missing ({error}): pip install 'kvstore-llm[gpu]', or [gpu-cuda12]"
        ) from error
    try:
        binding.getVersion()
    except Exception as error:  # loading it raises whatever its finder raises
        raise GpuError(f"CuPy finds no NVRTC: {error}") from error
    found: ModuleType = binding
    return found


def compile_kernels(capability: int) -> bytes:
    """Compile for a GPU of `capability` (as 90), without a cache and without a GPU.

    Returns machine code; PTX of the newest architecture below, which the driver compiles, where
    NVRTC does not know this one.

    Raises:
        GpuError: no NVRTC, or it refuses the source; its log is in the message.
    """
    binding = nvrtc()
    known = [int(arch) for arch in binding.getSupportedArchs() if int(arch) <= capability]
    if not known:
        raise GpuError(f"NVRTC {binding.getVersion()} does not compile for sm_{capability}")
    is_exact = capability in known
    target = f"sm_{capability}" if is_exact else f"compute_{max(known)}"
    directory = kernel_directory()
    program = binding.createProgram(
        (directory / SOURCE).read_text(),
        SOURCE,
        tuple((directory / name).read_bytes() for name in HEADERS),
        tuple(name.encode() for name in HEADERS),
    )
    try:
        binding.compileProgram(program, (f"--gpu-architecture={target}", *_OPTIONS))
        image: bytes = binding.getCUBIN(program) if is_exact else binding.getPTX(program) + b"\0"
    except binding.NVRTCError as error:
        raise GpuError(
            f"NVRTC refuses {SOURCE} for {target}: {error}: {binding.getProgramLog(program)}"
        ) from error
    finally:
        binding.destroyProgram(program)
    return image


def cached_kernels(
    capability: int,
    directory: Path | None = None,
    compiler: Compiler = compile_kernels,
    version: str | None = None,
) -> bytes:
    """As `compile_kernels`, through the cache in `directory` (default: the user's).

    `version` of the compiler; default: NVRTC's. What cannot be cached is compiled each time.

    Raises:
        GpuError: as `compile_kernels`.
    """
    if version is None:
        version = ".".join(map(str, nvrtc().getVersion()))
    directory = cache_directory() / "kernels" if directory is None else directory
    path = directory / f"{_key(capability, version)}.bin"
    image = _load(path) if _make_private(directory) else None
    if image is None:
        image = compiler(capability)
        _save(path, image)
    return image


def _key(capability: int, version: str) -> str:
    digest = hashlib.sha256(f"1 {capability} {version} {_OPTIONS}".encode())
    directory = kernel_directory()
    for name in (SOURCE, *HEADERS):
        text = (directory / name).read_bytes()
        digest.update(f"{name} {len(text)}".encode() + text)
    return digest.hexdigest()


def _make_private(directory: Path) -> bool:
    """Whether the directory is there, and nobody else can write to it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and _is_ours(found)


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and found.st_mode & 0o077 == 0


def _load(path: Path) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or not _is_ours(found):
            return None
        if found.st_size > _IMAGE_BYTES_MAX:
            return None
        data = file.read()
    digest, image = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return image if image and hashlib.sha256(image).digest() == digest else None


def _save(path: Path, image: bytes) -> None:
    if not _make_private(path.parent):
        return
    # Of two processes that compile at a time, the last one's stays; both are the same.
    with suppress(OSError):
        fd, name = tempfile.mkstemp(dir=path.parent)  # 0600
        try:
            with open(fd, "wb") as file:
                file.write(hashlib.sha256(image).digest() + image)
            os.replace(name, path)
        except OSError:
            with suppress(OSError):
                os.unlink(name)
