"""The GPU that CUDA's driver reports, with a driver made for the test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A driver with COUNT devices, whose cuInit gives ERROR.
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return ERROR; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 7; return ordinal; }
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", length);
    return device != 7;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : -1;
    return device != 7;
}
"""


@pytest.mark.parametrize(
    ("error", "count", "expected"),
    [
        (0, 1, "Gpu(name='NVIDIA H100 80GB HBM3 MIG 1g.10gb', capability='sm90')"),
        (0, 0, "None"),
        (100, 1, "None"),  # CUDA_ERROR_NO_DEVICE
    ],
)
def test_the_first_gpu_is_that_of_the_driver(error: int, count: int, expected: str, tmp_path: Path) -> None:
    source = tmp_path / "driver.c"
    source.write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    defined = [f"-DERROR={error}", f"-DCOUNT={count}"]
    subprocess.run(["cc", "-shared", "-fPIC", *defined, "-o", str(library), str(source)], check=True)
    code = "from variator_export.core.gpu import first_gpu; print(first_gpu())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == expected
