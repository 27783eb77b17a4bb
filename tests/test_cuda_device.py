"""Memory of a GPU, on a CUDA runtime that computes in the host's memory.

Every call is compared with NVIDIA's bindings: it must be one of theirs, with as many arguments.
"""

import ctypes
import gc
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from cuda.bindings import runtime

from variator_export.core.errors import UserError
from variator_export.engines.tensorrt import device as module
from variator_export.engines.tensorrt import dlpack
from variator_export.engines.tensorrt.device import CudaDevice

SUCCESS = runtime.cudaError_t.cudaSuccess


def _method(name: str) -> str:
    """cudaFreeAsync is `_free_async`."""
    return re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", name.removeprefix("cuda"))


class HostCuda:
    """In the place of `cuda.bindings.runtime`."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.failing: str | None = None
        self.error = runtime.cudaError_t.cudaErrorMemoryAllocation
        self.handles = itertools.count(100)
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.alive: set[int] = set()
        self.copies = 0
        # Copies to the GPU, which CUDA makes when the stream comes to them: their source must stay.
        self.waiting: list[tuple[int, int, int]] = []
        self.page_locked: dict[int, Any] = {}
        self.waits: list[tuple[int, int]] = []
        self.events: dict[int, int] = {}
        self.locks_memory = True
        # Events behind work that is not done.
        self.waiting_events: set[int] = set()
        self.alive_events: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        real = getattr(runtime, name)
        if not name.startswith("cuda") or not callable(real) or isinstance(real, type):
            return real  # enums and constants
        parameters = re.match(rf"{name}\((.*)\)", real.__doc__)[1]

        def call(*arguments: Any) -> Any:
            assert len(arguments) == len([part for part in parameters.split(",") if part]), name
            if name == self.failing:
                self.failing = self.recording = None
                return self.error, None
            if name == "cudaEventQuery":
                (event,) = arguments
                busy = event in self.waiting_events
                return (runtime.cudaError_t.cudaErrorNotReady if busy else SUCCESS,)
            found = getattr(self, _method(name), lambda *_: ())(*arguments)
            return (SUCCESS, *found) if name != "cudaGetErrorString" else real(*arguments)

        return call

    def _get_device_count(self) -> tuple[int]:
        return (1,)

    def _get_device(self) -> tuple[int]:
        return (0,)

    def _mem_pool_create(self, wanted: Any) -> tuple[int]:
        assert wanted.allocType == runtime.cudaMemAllocationType.cudaMemAllocationTypePinned
        assert wanted.location.type == runtime.cudaMemLocationType.cudaMemLocationTypeDevice
        assert wanted.location.id == 0
        self.alive.add(3)
        return (3,)

    def _mem_pool_destroy(self, pool: int) -> tuple[()]:
        self.alive.remove(pool)
        return ()

    def _mem_pool_set_attribute(self, pool: int, attribute: Any, value: Any) -> tuple[()]:
        assert (pool, int(value)) == (3, 2**64 - 1)
        assert attribute == runtime.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
        return ()

    def _get_device_properties(self, _: int) -> tuple[Any]:
        return (type("properties", (), {"name": b"NVIDIA H\0\0"}),)

    def _stream_create_with_flags(self, flags: int) -> tuple[int]:
        assert flags == runtime.cudaStreamNonBlocking
        self.alive.add(7)
        return (7,)

    def _stream_destroy(self, stream: int) -> tuple[()]:
        self.alive.remove(stream)
        return ()

    def _malloc_from_pool_async(self, size: int, pool: int, _: int) -> tuple[int]:
        assert pool in self.alive
        assert self.recording is None
        buffer = ctypes.create_string_buffer(b"x" * size, size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return (ctypes.addressof(buffer),)

    def _work_off(self) -> None:
        self.waiting_events.clear()
        for copy in self.waiting:
            ctypes.memmove(*copy)
        self.waiting.clear()

    def _stream_synchronize(self, _: int) -> tuple[()]:
        self._work_off()
        return ()

    def _host_alloc(self, size: int, flags: int) -> tuple[int]:
        assert flags == runtime.cudaHostAllocDefault
        assert self.locks_memory
        buffer = ctypes.create_string_buffer(size)
        self.page_locked[ctypes.addressof(buffer)] = buffer
        return (ctypes.addressof(buffer),)

    def _free_host(self, pointer: int) -> tuple[()]:
        del self.page_locked[pointer]
        return ()

    def _event_create_with_flags(self, flags: int) -> tuple[int]:
        assert flags == runtime.cudaEventDisableTiming
        event = next(self.handles)
        self.alive_events.add(event)
        return (event,)

    def _event_record(self, event: int, stream: int) -> tuple[()]:
        assert self.recording is None or stream != 7, "it would be recorded"
        self.events[event] = stream
        if stream == 7:
            self.waiting_events.add(event)
        return ()

    def _stream_wait_event(self, stream: int, event: int, _: int) -> tuple[()]:
        assert self.recording is None, "it would be recorded"
        self.waits.append((stream, self.events.pop(event)))
        return ()

    def _event_destroy(self, event: int) -> tuple[()]:
        self.alive_events.remove(event)
        self.waiting_events.discard(event)
        return ()

    def _free_async(self, pointer: int, _: int) -> tuple[()]:
        assert self.recording is None, "it would be recorded"
        self._work_off()
        del self.memory[pointer]
        return ()

    def _memcpy_async(self, target: int, source: int, size: int, kind: Any, _: int) -> tuple[()]:
        kinds = runtime.cudaMemcpyKind
        on_device = {
            kinds.cudaMemcpyHostToDevice: [target],
            kinds.cudaMemcpyDeviceToHost: [source],
            kinds.cudaMemcpyDeviceToDevice: [target, source],
        }
        for place in on_device[kind]:
            ends = [start + len(buffer.raw) for start, buffer in self.memory.items() if start <= place]
            assert any(place + size <= end for end in ends), "beyond the memory"
        self.copies += 1
        if kind == kinds.cudaMemcpyHostToDevice:
            self.waiting.append((target, source, size))
        else:
            self._work_off()
            ctypes.memmove(target, source, size)
        return ()

    def _stream_begin_capture(self, _: int, __: Any) -> tuple[()]:
        self.recording = []
        return ()

    def _stream_end_capture(self, _: int) -> tuple[int]:
        handle, self.graphs[handle] = (found := next(self.handles)), self.recording or []
        self.recording = None
        return (found,)

    def _graph_instantiate(self, graph: int, _: int) -> tuple[int]:
        handle = next(self.handles)
        self.graphs[handle] = self.graphs[graph]
        return (handle,)

    def _graph_destroy(self, graph: int) -> tuple[()]:
        del self.graphs[graph]
        return ()

    _graph_exec_destroy = _graph_destroy

    def _graph_launch(self, graph: int, _: int) -> tuple[()]:
        for work in self.graphs[graph]:
            work()
        return ()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    host = HostCuda()
    monkeypatch.setattr("cuda.bindings.runtime", host)
    return host


ARRAYS = [
    np.arange(6, dtype=np.int64).reshape(2, 3),
    np.arange(12, dtype=np.float32).reshape(3, 4).T,
    np.array([[1.5, -2.0]], np.float16),
    np.array([1.5, 3.0], ml_dtypes.bfloat16),
    np.zeros((0, 4), np.float32),
]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}-{array.shape}")
def test_what_is_copied_there_comes_back(array: np.ndarray) -> None:
    device = CudaDevice()
    tensor = device.upload(array)
    found = device.download(tensor)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert (found == array).all()
    device.overwrite(tensor, array + array)
    assert (device.download(tensor) == array + array).all()
    assert device.empty(array.shape, array.dtype.name).dtype == array.dtype
    with pytest.raises(ValueError, match=r"float64 \(1,\) into"):
        device.overwrite(tensor, np.zeros(1))


@pytest.mark.parametrize(
    ("rows", "copies"),
    [([2, 0, 0, 3], 4), ([0, 1, 2, 3], 1), ([3], 1), ([1, 2, 0], 2)],
    ids=["each", "all", "last", "neighbours"],
)
def test_rows_are_copied_on_the_device(cuda: HostCuda, rows: list[int], copies: int) -> None:
    device, chosen = CudaDevice(), np.array(rows)
    for dtype in (np.float32, np.float16):
        array = np.arange(4 * 2 * 3, dtype=dtype).reshape(4, 2, 3)
        tensor = device.upload(array)
        cuda.copies = 0
        found = device.take(tensor, chosen)
        assert cuda.copies == copies, "one for rows that follow each other"
        assert np.array_equal(device.download(found), array[chosen])
    empty = device.take(device.upload(np.zeros((4, 2, 0), np.float32)), chosen)
    assert empty.shape == (len(rows), 2, 0)


def test_memory_is_given_back_with_its_last_reference(cuda: HostCuda) -> None:
    device = CudaDevice()
    tensors = [device.upload(array) for array in ARRAYS]
    assert len(cuda.memory) == len({tensor.data_ptr() for tensor in tensors}) == len(ARRAYS)
    del tensors[0]
    assert len(cuda.memory) == len(ARRAYS) - 1
    tensors.clear()
    assert not cuda.memory
    assert cuda.alive == {device.stream, 3}, "the pool is the device's own"
    del device
    gc.collect()
    assert not cuda.alive, "nor do the stream and the pool stay"
    assert not cuda.alive_events
    assert not cuda.page_locked


def test_what_is_recorded_runs_when_it_is_replayed(cuda: HostCuda) -> None:
    device = CudaDevice()
    dropped, runs = [device.upload(ARRAYS[0])], []

    def enqueue() -> None:
        assert cuda.recording is not None
        cuda.recording.append(lambda: runs.append(1))
        dropped.clear()  # is not freed while the stream records

    replay = device.capture(enqueue)
    assert not cuda.memory
    assert not runs
    replay()
    replay()
    assert len(runs) == 2
    del replay
    assert not cuda.graphs

    def fail() -> None:
        raise UserError("The engine refuses.", "Try again.")

    with pytest.raises(UserError, match="The engine refuses"):
        device.capture(fail)
    assert cuda.recording is None, "the stream is of use again"
    assert not cuda.graphs


def test_copies_go_through_page_locked_memory_that_is_used_again(cuda: HostCuda) -> None:
    device = CudaDevice()
    arrays = [np.full((30, 40), value, np.float32) for value in range(6)]
    for _ in range(3):
        tensors = {str(index): device.upload(array) for index, array in enumerate(arrays)}
        found = device.download_all({name: tensors[name] for name in ("4", "1")})
        assert list(found) == ["4", "1"]
        assert (found["4"] == 4).all()
        assert (found["1"] == 1).all()
        assert all(
            (device.download(tensors[str(index)]) == array).all() for index, array in enumerate(arrays)
        )
        assert len(cuda.page_locked) == 8, "one block for each copy that was not done yet"
    one, other = found["4"], device.download_all({"x": tensors["2"]})["x"]
    assert (one == 4).all(), "a result is not in memory that is used again"
    assert (other == 2).all()
    large = np.arange(5 << 20, dtype=np.float32)
    tensor = device.upload(large)
    large[0] = -1  # was read already
    assert device.download(tensor)[0] == 0
    assert len(cuda.page_locked) == 8, "so much is not locked"
    tensors.clear()
    del tensor, device
    gc.collect()
    assert not cuda.page_locked
    assert not cuda.memory


def test_calls_that_leave_their_outputs_there_do_not_gather_memory(cuda: HostCuda) -> None:
    device = CudaDevice()
    for value in range(50):
        tensor = device.upload(np.full(100, value))
        cuda._work_off()  # the GPU comes to it; nobody waits
        assert len(cuda.page_locked) == 1
    assert (device.download(tensor) == 49).all()


def test_blocks_in_use_stay_in_use_if_somebody_waits_meanwhile(
    cuda: HostCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finalizers wait for the stream; they run wherever Python collects garbage."""
    del cuda
    device = CudaDevice()
    tensors = {str(value): device.upload(np.full(100, value)) for value in range(3)}
    take = device._staging.take

    def take_and_wait(num_bytes: int) -> Any:
        block = take(num_bytes)
        device.synchronize()
        return block

    monkeypatch.setattr(device._staging, "take", take_and_wait)
    for name, array in device.download_all(tensors).items():
        assert (array == int(name)).all()


def test_without_page_locked_memory_arrays_are_copied_all_the_same(cuda: HostCuda) -> None:
    device = CudaDevice()
    cuda.failing = "cudaHostAlloc"
    tensor = device.upload(np.arange(5))
    cuda.failing = "cudaHostAlloc"
    assert (device.download(tensor) == np.arange(5)).all()
    assert not cuda.page_locked


def test_memory_that_a_consumer_lets_go_of_during_a_recording(cuda: HostCuda) -> None:
    device = CudaDevice()
    capsules = [device.upload(np.arange(5)).__dlpack__()]

    def enqueue() -> None:
        capsules.clear()
        assert len(cuda.memory) == 1

    cuda.waits.clear()
    device.capture(enqueue)
    assert cuda.waits == [(7, 1)], "after the recording"
    assert not cuda.memory


def test_a_process_ends_while_other_libraries_hold_memory() -> None:
    program = """
import sys
import numpy as np, torch
from variator_export.engines.tensorrt import dlpack
array = np.arange(6.0)
class Owner:
    def __dlpack__(self, **_):
        return dlpack.to_capsule(array.ctypes.data, (2, 3), array.dtype, (dlpack.CPU, 0), lambda: None)
    def __dlpack_device__(self):
        return dlpack.CPU, 0
held = torch.from_dlpack(Owner()), np.from_dlpack(Owner())
sys.kept = Owner().__dlpack__(), held
print(float(held[0].sum()), float(held[1].sum()))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "15.0 15.0\n", "")


@pytest.mark.parametrize("dtype", ["float32", "int64", "float16", "bfloat16", "bool"])
def test_other_libraries_take_tensors_without_a_copy(
    cuda: HostCuda, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(dlpack, "CUDA", dlpack.CPU)  # the stand-in's memory is the host's
    device = CudaDevice()
    array = np.array([[1, 0, 2], [3, 4, 0]]).astype(module.numpy_type(dtype))
    tensor = device.upload(array)
    device.synchronize()
    pointer = tensor.data_ptr()
    taken = torch.from_dlpack(tensor)
    assert (taken.data_ptr(), tuple(taken.shape), str(taken.dtype)) == (pointer, (2, 3), f"torch.{dtype}")
    assert (taken.float().numpy() == array.astype(np.float32)).all()
    assert cuda.waits == [(1, 7)], "the default stream waits for the device's"
    del tensor
    assert pointer in cuda.memory, "the consumer still has it"
    del taken
    assert cuda.waits == [(1, 7), (7, 1)]
    assert pointer not in cuda.memory
    capsule = device.upload(array).__dlpack__(stream=-1)
    assert len(cuda.memory) == 1
    del capsule
    assert not cuda.memory, "nobody took it"
    assert len(cuda.waits) == 2
    tensor = device.upload(array)
    for asked in ({"copy": True}, {"dl_device": (dlpack.CPU, 1)}):
        with pytest.raises(BufferError, match="Only the memory itself"):
            tensor.__dlpack__(**asked)
    assert tensor.__dlpack_device__() == (dlpack.CPU, 0)
    if dtype == "bfloat16":
        assert not hasattr(tensor, "__cuda_array_interface__")
        return
    assert tensor.__cuda_array_interface__ == {
        "version": 3,
        "shape": (2, 3),
        "typestr": array.dtype.str,
        "data": (tensor.data_ptr(), False),
        "stream": 7,
    }


def test_errors_are_in_cudas_words(cuda: HostCuda) -> None:
    device = CudaDevice()
    assert (device.name, device.stream) == ("NVIDIA H", 7)
    for name in ("cudaMallocFromPoolAsync", "cudaMemcpyAsync"):
        cuda.failing = name
        with pytest.raises(
            UserError, match=r"^CUDA failed: out of memory \(cudaErrorMemoryAllocation\)\.\n"
        ) as raised:
            device.upload(ARRAYS[0])
        assert "run smaller batches" in str(raised.value.hint)
    cuda.failing = "cudaStreamEndCapture"
    with pytest.raises(UserError, match="out of memory"):
        device.capture(lambda: None)
    cuda.failing, cuda.error = "cudaStreamSynchronize", runtime.cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(UserError, match="illegal memory access") as raised:
        device.download(device.upload(ARRAYS[0]))
    assert "memory is full" not in str(raised.value.hint)


def test_without_bindings_or_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bindings themselves say that there is none."""
    with pytest.raises(UserError, match=r"CUDA sees no GPU here: .* \(cudaError\w+\)\.\n"):
        CudaDevice()
    monkeypatch.setattr(module, "installed_version", lambda _: None)
    with pytest.raises(UserError, match="needs the Python package cuda-bindings") as raised:
        CudaDevice()
    assert raised.value.hint == "Install it with: pip install 'cuda-bindings>=13.0.3,<14'"
