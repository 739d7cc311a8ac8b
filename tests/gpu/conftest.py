"""Devices: the fake driver, host memory, and, with `-m gpu`, the machine's GPU."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.gpu import CudaDevice, Device, HostDevice, available
from tests.gpu.fake_cuda import FakeCuda, build


@pytest.fixture(scope="session")
def fake_library() -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return build()


@pytest.fixture
def fake(fake_library: Path, tmp_path: Path) -> FakeCuda:
    return FakeCuda(fake_library, tmp_path)


@pytest.fixture
def gpu() -> Iterator[CudaDevice]:
    """The machine's own."""
    has, why = available()
    if not has:
        pytest.skip(why)
    device = CudaDevice()
    yield device
    device.close()


@pytest.fixture(
    params=["host", "late_host", "fake", "late_fake", pytest.param("gpu", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Each kind. Late ones run nothing before somebody waits for it."""
    kind = request.param
    if kind == "gpu":
        yield request.getfixturevalue("gpu")
    elif kind.endswith("host"):
        made: Device = HostDevice(late=kind == "late_host")
        yield made
        made.close()
    else:
        fake: FakeCuda = request.getfixturevalue("fake")
        fake.set_late(kind == "late_fake")
        made = fake.device()
        yield made
        made.close()
