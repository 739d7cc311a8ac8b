"""Proves that the kernels compile for the GPUs that we name, as they are meant to, and that what is
compiled is kept by its user alone. By nvcc where there is one, and by NVRTC with `-m slow`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvstore import GpuError, config_sources
from kvstore.gpu import modules
from kvstore.gpu.modules import KERNELS, SOURCE, cached_kernels, compile_kernels, kernel_directory
from tests.gpu.fake_cuda import build

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def nvcc(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert NVCC is not None
    command = [NVCC, "-std=c++17", *arguments, str(kernel_directory() / SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    return done


@needs_nvcc
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)],
)
def test_nvcc_compiles_without_warnings_or_spills(architecture: int, tmp_path: Path) -> None:
    image = tmp_path / "kernels.cubin"
    done = nvcc(
        *("-cubin", f"-arch=sm_{architecture}", "-Werror=all-warnings", "-Xptxas=-v"),
        *("-o", str(image)),
    )
    assert image.read_bytes()[:4] == b"\x7fELF"
    compiled = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", done.stderr)
    assert sorted(compiled) == sorted((name, str(architecture)) for name in KERNELS)
    assert set(re.findall(r"(\d+) bytes spill", done.stderr)) == {"0"}
    assert set(re.findall(r"(\d+) bytes stack frame", done.stderr)) == {"0"}


@needs_nvcc
def test_wide_words_are_read_and_written_by_one_instruction(tmp_path: Path) -> None:
    code = tmp_path / "kernels.ptx"
    nvcc("-ptx", "-arch=sm_90", "-o", str(code))
    entries = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", code.read_text(), re.DOTALL))
    for kind in ("gather", "scatter"):
        body = entries[f"kv_{kind}_16"]
        assert len(re.findall(r"ld(?:\.global)?\.v4\.u32", body)) >= 4
        assert len(re.findall(r"st(?:\.global)?\.v4\.u32", body)) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100, 9999])
def test_nvrtc_compiles_without_a_gpu(architecture: int) -> None:
    """9999: a GPU that this NVRTC does not know gets PTX."""
    pytest.importorskip("cupy")
    try:
        modules.nvrtc()
    except GpuError as error:
        pytest.skip(str(error))
    image = compile_kernels(architecture)
    if architecture == 9999:
        assert b".target sm_" in image
        assert image.endswith(b"\0")
    else:
        assert image[:4] == b"\x7fELF"
        assert all(name.encode() in image for name in KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("with_headers", [True, False])
def test_the_fake_driver_compiles_with_nvidias_declarations_and_with_ours(
    with_headers: bool,
) -> None:
    """With NVIDIA's, a signature of the fake that is not theirs is an error. It is called with
    those of kvstore/gpu/driver.py by every other test here."""
    if with_headers and not Path("/usr/local/cuda/include/cudaTypedefs.h").exists():
        pytest.skip("needs NVIDIA's headers")
    assert build(with_headers=with_headers).exists()


class Counting:
    """A compiler that counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, capability: int) -> bytes:
        self.calls += 1
        return b"code for %d" % capability


def test_code_is_compiled_once_for_each_gpu_and_compiler(tmp_path: Path) -> None:
    compiler = Counting()
    for _ in range(2):
        for capability, version in ((90, "13.0"), (80, "13.0"), (90, "13.1")):
            image = cached_kernels(capability, tmp_path / "c", compiler, version)
            assert image == b"code for %d" % capability
    assert compiler.calls == 3
    files = list((tmp_path / "c").iterdir())
    assert len(files) == 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("harm", ["flip", "cut", "open_file", "open_directory", "link"])
def test_code_that_others_could_have_written_is_not_loaded(tmp_path: Path, harm: str) -> None:
    compiler = Counting()
    directory = tmp_path / "c"
    cached_kernels(90, directory, compiler, "1")
    (path,) = directory.iterdir()
    data = path.read_bytes()
    if harm == "flip":
        path.write_bytes(data[:-1] + b"!")
    elif harm == "cut":
        path.write_bytes(data[:32])
    elif harm == "open_file":
        path.chmod(0o622)
    elif harm == "open_directory":
        directory.chmod(0o777)
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    assert cached_kernels(90, directory, compiler, "1") == b"code for 90"
    assert compiler.calls == 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    compiler = Counting()
    assert cached_kernels(90, tmp_path / "file" / "c", compiler, "1") == b"code for 90"


def test_the_cache_is_the_users(tmp_path: Path) -> None:
    found = config_sources.cache_directory({"XDG_CACHE_HOME": str(tmp_path)})
    assert found == tmp_path / "kvstore"
    home = config_sources.cache_directory({"XDG_CACHE_HOME": "relative"})
    assert home == Path(os.path.expanduser("~")) / ".cache" / "kvstore"
