"""`CudaDevice` for real: what tests can only try on a stand-in."""

import threading
from typing import Any

import numpy as np
import torch

from variator_export.core.errors import UserError
from variator_export.engines.tensorrt.device import CudaDevice


def check() -> dict[str, Any]:
    """Try each of the device's methods; returns what failed, by name, and what there was to say."""
    device = CudaDevice()
    checks = {
        "upload, overwrite, download": _copies,
        "rows on the device": _rows,
        "a recording": _recording,
        "other libraries": _other_libraries,
        "threads": _threads,
        "out of memory": _out_of_memory,
    }
    found: dict[str, Any] = {"gpu": device.name}
    for name, run in checks.items():
        try:
            found[name] = run(device) or "right"
        except Exception as error:
            found[name] = f"WRONG: {type(error).__name__}: {error}"
        print(f"  {name}: {found[name]}", flush=True)
    return found


def _copies(device: CudaDevice) -> None:
    for size in (1, 1000, 30 << 20):
        array = np.random.default_rng(0).standard_normal(size).astype(np.float32)
        tensor = device.upload(array)
        array_then, array = array.copy(), array * 2
        assert np.array_equal(device.download(tensor), array_then)
        device.overwrite(tensor, array)
        array[:] = 0  # was read already
        assert np.array_equal(device.download_all({"x": tensor})["x"], array_then * 2)


def _rows(device: CudaDevice) -> None:
    array = np.arange(5 * 7 * 3, dtype=np.float16).reshape(5, 7, 3)
    chosen = np.array([4, 0, 1, 1])
    assert np.array_equal(device.download(device.take(device.upload(array), chosen)), array[chosen])


def _recording(device: CudaDevice) -> None:
    source, target = device.upload(np.arange(8.0)), device.upload(np.zeros(8))
    runtime, size = device._cuda, 8 * 8
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice

    def copy() -> None:
        device._call(runtime.cudaMemcpyAsync, target.data_ptr(), source.data_ptr(), size, kind, device.stream)

    replay = device.capture(copy)
    assert not device.download(target).any(), "recording ran it"
    replay()
    assert np.array_equal(device.download(target), np.arange(8.0))
    device.overwrite(source, np.ones(8))
    replay()
    assert device.download(target).all()


def _other_libraries(device: CudaDevice) -> None:
    tensor = device.upload(np.arange(6, dtype=np.float32).reshape(2, 3))
    by_dlpack, by_interface = torch.from_dlpack(tensor), torch.as_tensor(tensor, device="cuda")
    assert by_dlpack.data_ptr() == by_interface.data_ptr() == tensor.data_ptr()
    del tensor
    device.upload(np.full((2, 3), -1, np.float32))
    assert by_dlpack.sum().item() == by_interface.sum().item() == 15


def _threads(device: CudaDevice) -> None:
    wrong: list[int] = []

    def work(value: int) -> None:
        for _ in range(200):
            found = device.download(device.upload(np.full(5000, value, np.int64)))
            if not (found == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"threads {sorted(set(wrong))} got values of others"


def _out_of_memory(device: CudaDevice) -> str:
    try:
        device.empty((1 << 44,), "uint8")
    except UserError as error:
        assert np.array_equal(device.download(device.upload(np.arange(3))), np.arange(3)), (
            "it is of no use now"
        )
        return error.message
    raise AssertionError("16 TiB were allocated")
