"""Device that holds a session's tensors: a GPU, or a stand-in for a GPU in tests.

The code uses NVIDIA's bindings of the CUDA runtime, because images that run engines have no PyTorch. No GPU
has executed this code yet; its calls and arguments match the bindings.
"""

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from variator_export.core.environment import installed_version
from variator_export.core.errors import UserError
from variator_export.engines.tensorrt.host_memory import CudaHostMemory
from variator_export.engines.tensorrt.staging import Staging
from variator_export.engines.tensorrt.tensor import CudaTensor


class Device(Protocol):
    """Memory, and a stream that carries all work.

    Attributes:
        lock: Lock of the stream. Each method takes it; a caller holds it for work that belongs together.
    """

    lock: AbstractContextManager[Any]

    def upload(self, array: np.ndarray) -> Any:
        """Copy values into a new tensor, which has `data_ptr()`."""
        ...

    def overwrite(self, tensor: Any, array: np.ndarray) -> None:
        """Replace the values of a tensor by others of the same shape; the address stays the same."""
        ...

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """Allocate a tensor for an output; dtype is a name such as `float32`."""
        ...

    def download(self, tensor: Any) -> np.ndarray:
        """The values of a tensor, after all work on the stream is done."""
        ...

    def download_all(self, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The values of several tensors, after one wait for the stream."""
        ...

    def take(self, tensor: Any, rows: np.ndarray) -> Any:
        """A new tensor with these rows of a tensor, copied on the device after the work on the stream."""
        ...

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record the work that a function enqueues on the stream, without running it; returns its replay."""
        ...

    def synchronize(self) -> None:
        """Wait for all work on the stream."""
        ...

    @property
    def stream(self) -> int:
        """The handle of the CUDA stream."""
        ...

    @property
    def name(self) -> str:
        """Name of the GPU, as its driver reports it."""
        ...


_ALL = 2**64 - 1  # bytes


class CudaDevice:
    """The current GPU (the first of CUDA_VISIBLE_DEVICES), with a stream of its own.

    Attributes:
        name: Name of the GPU, as its driver reports it.
        index: Number of the GPU in this process.

    Raises:
        UserError: The bindings are not installed, or CUDA sees no GPU.
    """

    def __init__(self) -> None:
        if installed_version("cuda-bindings") is None:
            # Name the package itself: an extra of ours would bring another TensorRT into NVIDIA's images.
            raise UserError(
                "Running engines needs the Python package cuda-bindings, which is not installed here.",
                "Install it with: pip install 'cuda-bindings>=13.0.3,<14'",
            )
        from cuda.bindings import driver, runtime

        self._cuda = runtime
        error, count = runtime.cudaGetDeviceCount()
        if error != runtime.cudaError_t.cudaSuccess or count == 0:
            why = "it has none" if error == runtime.cudaError_t.cudaSuccess else self._words(error)
            raise UserError(
                f"CUDA sees no GPU here: {why}.",
                "Run engines on a machine with a GPU and a driver for CUDA 13; onnxruntime runs the bundle "
                "on a CPU.",
            )
        self.index = index = int(self._call(runtime.cudaGetDevice))
        properties = self._call(runtime.cudaGetDeviceProperties, index)
        self.name = bytes(properties.name).split(b"\0")[0].decode()
        # A pool of our own, because the default one belongs to the whole process. By default a pool returns
        # free memory to the system at each wait, so every call would map memory anew.
        wanted = runtime.cudaMemPoolProps()
        wanted.allocType = runtime.cudaMemAllocationType.cudaMemAllocationTypePinned
        wanted.location.type = runtime.cudaMemLocationType.cudaMemLocationTypeDevice
        wanted.location.id = index
        self._pool = self._call(runtime.cudaMemPoolCreate, wanted)
        # Finalizers run in reverse order; memory goes before its pool.
        weakref.finalize(self, runtime.cudaMemPoolDestroy, self._pool)
        threshold = runtime.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
        self._call(runtime.cudaMemPoolSetAttribute, self._pool, threshold, driver.cuuint64_t(_ALL))
        self._stream = self._call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)
        weakref.finalize(self, runtime.cudaStreamDestroy, self._stream)
        self.lock: AbstractContextManager[Any] = threading.RLock()
        self._is_recording = False
        self._to_free: list[int] = []
        self._staging = Staging(CudaHostMemory(runtime, self._stream))
        weakref.finalize(self, _end_staging, runtime, self._stream, self._staging)
        # Events of consumers that let go of memory while the stream records.
        self._to_wait: list[Any] = []
        self._closed: list[bool] = []
        weakref.finalize(self, self._closed.append, True)  # the first to run

    def upload(self, array: np.ndarray) -> CudaTensor:
        """Copy an array to the GPU."""
        tensor = self._allocate(array.shape, array.dtype)
        self.overwrite(tensor, array)
        return tensor

    def overwrite(self, tensor: CudaTensor, array: np.ndarray) -> None:
        """Copy an array into a tensor; the array has been read when the method returns."""
        if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"{array.dtype} {array.shape} into {tensor.dtype} {tensor.shape}")
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        with self.lock:
            block = self._staging.take(array.nbytes)
            if block is None:
                array = np.ascontiguousarray(array)
                self._copy(tensor.data_ptr(), array.ctypes.data, array.nbytes, kind)
                self.synchronize()  # otherwise CUDA may read the array later
                return
            block.write(array)
            self._copy(tensor.data_ptr(), block.pointer, array.nbytes, kind)
            self._staging.give_back_later(block)

    def empty(self, shape: Sequence[int], dtype: str) -> CudaTensor:
        """Allocate memory for an output."""
        return self._allocate(shape, numpy_type(dtype))

    def download(self, tensor: CudaTensor) -> np.ndarray:
        """Wait for the stream and copy to the host."""
        return self.download_all({"": tensor})[""]

    def download_all(self, tensors: Mapping[str, CudaTensor]) -> dict[str, np.ndarray]:
        """Copy several tensors to the host, and wait for the stream once."""
        arrays = {name: np.empty(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        with self.lock:
            blocks = {name: self._staging.take(array.nbytes) for name, array in arrays.items()}
            for name, block in blocks.items():
                target = arrays[name].ctypes.data if block is None else block.pointer
                self._copy(target, tensors[name].data_ptr(), arrays[name].nbytes, kind)
            self._call(self._cuda.cudaStreamSynchronize, self._stream)
        for name, block in blocks.items():
            if block is not None:
                block.read_into(arrays[name])
                self._staging.give_back(block)
        return arrays

    def take(self, tensor: CudaTensor, rows: np.ndarray) -> CudaTensor:
        """Copy rows on the GPU: one copy for each run of rows that follow each other."""
        found = self._allocate((len(rows), *tensor.shape[1:]), tensor.dtype)
        row_bytes = int(np.prod(tensor.shape[1:], dtype=np.int64)) * tensor.dtype.itemsize
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        starts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1)
        with self.lock:
            for start, end in zip(starts, np.append(starts[1:], len(rows)), strict=True):
                if not row_bytes:
                    break
                self._call(
                    self._cuda.cudaMemcpyAsync,
                    found.data_ptr() + int(start) * row_bytes,
                    tensor.data_ptr() + int(rows[start]) * row_bytes,
                    int(end - start) * row_bytes,
                    kind,
                    self._stream,
                )
        return found

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record the stream while the function enqueues."""
        with self.lock:
            self.synchronize()
            return self._capture(enqueue)

    def _capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        cuda = self._cuda
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(cuda.cudaStreamBeginCapture, self._stream, mode)
        self._is_recording = True
        graph = None
        try:
            try:
                enqueue()
            finally:  # the stream must stay usable, whatever happened
                error, graph = cuda.cudaStreamEndCapture(self._stream)
                self._is_recording = False
                while self._to_wait:
                    self._wait_for(self._to_wait.pop(), self._stream)
                while self._to_free:
                    self._free(self._to_free.pop())
            self._check(error)
            recorded = self._call(cuda.cudaGraphInstantiate, graph, 0)
        finally:
            if graph is not None:
                cuda.cudaGraphDestroy(graph)

        def replay() -> None:
            self._call(cuda.cudaGraphLaunch, recorded, self._stream)

        weakref.finalize(replay, cuda.cudaGraphExecDestroy, recorded)
        return replay

    def synchronize(self) -> None:
        """Wait for the stream. While it records, nothing runs: a recording begins on an idle stream."""
        with self.lock:
            if self._is_recording:
                return
            self._call(self._cuda.cudaStreamSynchronize, self._stream)

    def show_to(self, consumer: int) -> None:
        """Have the later work of another stream wait for the present work of this one."""
        with self.lock:
            self._wait_for(self._event(self._stream), consumer)

    def take_back_from(self, consumer: int) -> None:
        """Have the later work of this stream wait for the present work of another one.

        Nothing is raised, because finalizers call it.
        """
        if self._closed:
            return
        with self.lock:
            try:
                event = self._event(consumer)
                if self._is_recording:
                    self._to_wait.append(event)
                else:
                    self._wait_for(event, self._stream)
            except UserError:  # the stream is gone, say
                if not self._is_recording:
                    self._cuda.cudaDeviceSynchronize()

    def _event(self, stream: Any) -> Any:
        """An event for the present work of a stream, on this GPU."""
        cuda = self._cuda
        current = self._call(cuda.cudaGetDevice)
        self._call(cuda.cudaSetDevice, self.index)
        try:
            event = self._call(cuda.cudaEventCreateWithFlags, cuda.cudaEventDisableTiming)
        finally:
            cuda.cudaSetDevice(current)
        self._call(cuda.cudaEventRecord, event, stream)
        return event

    def _wait_for(self, event: Any, stream: Any) -> None:
        try:
            self._call(self._cuda.cudaStreamWaitEvent, stream, event, 0)
        finally:
            self._cuda.cudaEventDestroy(event)

    @property
    def stream(self) -> int:
        """The handle of the stream."""
        return int(self._stream)

    def _allocate(self, shape: Sequence[int], dtype: np.dtype[Any]) -> CudaTensor:
        num_bytes = max(int(np.prod(tuple(shape), dtype=np.int64)) * dtype.itemsize, 1)
        with self.lock:
            found = self._call(self._cuda.cudaMallocFromPoolAsync, num_bytes, self._pool, self._stream)
        pointer = int(found)
        tensor = CudaTensor(self, pointer, shape, dtype)
        weakref.finalize(tensor, self._free, pointer)
        return tensor

    def _free(self, pointer: int) -> None:
        """Free memory after earlier work; postponed while the stream records, which would record it."""
        with self.lock:
            if self._is_recording:
                self._to_free.append(pointer)
            else:
                # The error is ignored: at the end of a process it does not matter.
                self._cuda.cudaFreeAsync(pointer, self._stream)

    def _copy(self, target: int, source: int, num_bytes: int, kind: Any) -> None:
        """Copy after the earlier work."""
        self._call(self._cuda.cudaMemcpyAsync, target, source, num_bytes, kind, self._stream)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a call of the bindings; each call returns its error first."""
        error, *found = function(*arguments)
        self._check(error)
        return found[0] if found else None

    def _check(self, error: Any) -> None:
        if error != self._cuda.cudaError_t.cudaSuccess:
            is_full = error == self._cuda.cudaError_t.cudaErrorMemoryAllocation
            raise UserError(
                f"CUDA failed: {self._words(error)}.",
                "The GPU's memory is full: run smaller batches, or end other programs that use it."
                if is_full
                else "The error may come from an earlier call. If it persists after a restart, check what "
                "the engine needs: variator-export doctor BUNDLE",
            )

    def _words(self, error: Any) -> str:
        _, text = self._cuda.cudaGetErrorString(error)
        return f"{text.decode()} ({error.name})"


def _end_staging(cuda: Any, stream: Any, staging: Staging) -> None:
    """Free page-locked memory, after the copies from it."""
    cuda.cudaStreamSynchronize(stream)
    staging.close()


def numpy_type(name: str) -> np.dtype[Any]:
    """The numpy type of a name; for bfloat16 the type of ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes  # imported late: only keys, values and what is inside a graph are bfloat16

    return np.dtype(ml_dtypes.bfloat16)
