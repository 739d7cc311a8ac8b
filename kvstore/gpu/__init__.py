"""GPUs: memory, copy kernels, and direct access to the arena. See docs/gpu.md.

Nothing here is imported by `import kvstore`, and importing it needs no GPU: `available` tells.
"""

from kvstore.errors import GpuError
from kvstore.gpu.blocks import DeviceBlocks
from kvstore.gpu.cuda_device import CudaDevice
from kvstore.gpu.device import Device
from kvstore.gpu.driver import Driver
from kvstore.gpu.host_device import HostDevice
from kvstore.gpu.modules import nvrtc

__all__ = ["CudaDevice", "Device", "DeviceBlocks", "HostDevice", "available"]


def available(library: str | None = None) -> tuple[bool, str]:
    """Return whether the GPU tier can work here, and what was found or why not.

    `library`: the driver's, if not the usual one.
    """
    try:
        driver = Driver() if library is None else Driver(library)
        nvrtc()
    except GpuError as error:
        return False, str(error)
    return True, f"{driver.num_devices} GPU(s), driver for CUDA {driver.version // 1000}"
