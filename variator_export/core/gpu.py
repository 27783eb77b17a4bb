"""The GPU of this machine, as CUDA's driver reports it."""

import ctypes
import sys
from dataclasses import dataclass

# CUdevice_attribute: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_MAJOR, _MINOR = 75, 76
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, or a part of one (a MIG instance).

    Attributes:
        name: The GPU's name, as reported by the driver; that of a MIG instance names its size too.
        capability: The compute capability, for example `sm89`.
    """

    name: str
    capability: str


def first_gpu() -> Gpu | None:
    """The GPU on which CUDA programs run unless told otherwise; None if CUDA's driver finds no GPU.

    The driver knows what nvidia-smi does not: the order of CUDA's devices, CUDA_VISIBLE_DEVICES and the MIG
    instance given to this process. The driver's library is called directly, because machines that only read
    bundles have no Python package for CUDA, and images for serving no nvidia-smi.
    """
    driver = _driver()
    if driver is None or driver.cuInit(0) != 0:
        return None
    count, device = ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return None
    name = ctypes.create_string_buffer(_NAME_BYTES)
    major, minor = ctypes.c_int(), ctypes.c_int()
    errors = (
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetName(name, _NAME_BYTES, device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
    )
    return None if any(errors) else Gpu(name.value.decode(), f"sm{major.value}{minor.value}")


def _driver() -> ctypes.CDLL | None:
    """The library of CUDA's driver; None if it is not installed."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
