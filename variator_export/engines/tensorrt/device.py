"""Where a session's tensors are: a GPU's memory, or what stands for it in tests.

By NVIDIA's bindings of the CUDA runtime: images that run engines have no PyTorch. No GPU has executed this
code yet; calls and arguments are those of the bindings.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from variator_export.core.environment import installed_version
from variator_export.core.errors import UserError


class Device(Protocol):
    """Memory, and a stream that all work is on."""

    def upload(self, array: np.ndarray) -> Any:
        """A tensor with these values; has `data_ptr()`."""
        ...

    def overwrite(self, tensor: Any, array: np.ndarray) -> None:
        """Give a tensor other values of the same shape; its address stays."""
        ...

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """A tensor for an output; dtype: `float32`, say."""
        ...

    def download(self, tensor: Any) -> np.ndarray:
        """Its values, after everything on the stream is done."""
        ...

    def record(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what a function enqueues on the stream, without running it; gives what replays it."""
        ...

    @property
    def stream(self) -> int:
        """The handle of the CUDA stream."""
        ...

    @property
    def name(self) -> str:
        """Of the GPU, as its driver calls it."""
        ...


_ALL = 2**64 - 1  # bytes


class CudaTensor:
    """Memory on the GPU, as long as somebody holds it.

    Attributes:
        shape: Its shape.
        dtype: numpy's; of bfloat16 that of ml_dtypes.
    """

    def __init__(self, pointer: int, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        self._pointer, self.shape, self.dtype = pointer, tuple(shape), dtype

    def data_ptr(self) -> int:
        """Its address."""
        return self._pointer


class CudaDevice:
    """The current GPU (the first of CUDA_VISIBLE_DEVICES), with a stream of its own.

    Attributes:
        name: Of the GPU, as its driver calls it.

    Raises:
        UserError: The bindings are not installed, or CUDA sees no GPU.
    """

    def __init__(self) -> None:
        if installed_version("cuda-bindings") is None:
            # Not by an extra of ours, which would bring another TensorRT into NVIDIA's images.
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
                "Run engines where one is, with a driver for CUDA 13; onnxruntime runs the bundle on a CPU.",
            )
        index = self._call(runtime.cudaGetDevice)
        properties = self._call(runtime.cudaGetDeviceProperties, index)
        self.name = bytes(properties.name).split(b"\0")[0].decode()
        # Otherwise what is free goes back to the system at each wait, and every call maps its memory anew.
        pool = self._call(runtime.cudaDeviceGetDefaultMemPool, index)
        threshold = runtime.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
        self._call(runtime.cudaMemPoolSetAttribute, pool, threshold, driver.cuuint64_t(_ALL))
        self._stream = self._call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)
        weakref.finalize(self, runtime.cudaStreamDestroy, self._stream)
        self._is_recording = False
        self._to_free: list[int] = []

    def upload(self, array: np.ndarray) -> CudaTensor:
        """Copy an array to the GPU."""
        tensor = self._allocate(array.shape, array.dtype)
        self.overwrite(tensor, array)
        return tensor

    def overwrite(self, tensor: CudaTensor, array: np.ndarray) -> None:
        """Copy an array into a tensor; it has been read when this returns."""
        if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"{array.dtype} {array.shape} into {tensor.dtype} {tensor.shape}")
        array = np.ascontiguousarray(array)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(tensor.data_ptr(), array.ctypes.data, array.nbytes, kind)

    def empty(self, shape: Sequence[int], dtype: str) -> CudaTensor:
        """Memory for an output."""
        return self._allocate(shape, _numpy_type(dtype))

    def download(self, tensor: CudaTensor) -> np.ndarray:
        """Wait for the stream and copy to the host."""
        array = np.empty(tensor.shape, tensor.dtype)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(array.ctypes.data, tensor.data_ptr(), array.nbytes, kind)
        return array

    def record(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record the stream while the function enqueues."""
        cuda = self._cuda
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(cuda.cudaStreamBeginCapture, self._stream, mode)
        self._is_recording = True
        graph = None
        try:
            try:
                enqueue()
            finally:  # the stream has to be of use afterwards, whatever happened
                error, graph = cuda.cudaStreamEndCapture(self._stream)
                self._is_recording = False
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

    @property
    def stream(self) -> int:
        """Its handle."""
        return int(self._stream)

    def _allocate(self, shape: Sequence[int], dtype: np.dtype[Any]) -> CudaTensor:
        num_bytes = int(np.prod(tuple(shape), dtype=np.int64)) * dtype.itemsize
        pointer = int(self._call(self._cuda.cudaMallocAsync, max(num_bytes, 1), self._stream))
        tensor = CudaTensor(pointer, shape, dtype)
        weakref.finalize(tensor, self._free, pointer)
        return tensor

    def _free(self, pointer: int) -> None:
        """After what was enqueued before. What is freed while the stream records would be recorded."""
        if self._is_recording:
            self._to_free.append(pointer)
        else:
            self._cuda.cudaFreeAsync(pointer, self._stream)  # at the end of a process nobody minds an error

    def _copy(self, target: int, source: int, num_bytes: int, kind: Any) -> None:
        """After what was enqueued before; done when this returns. Without waiting, CUDA may read it later."""
        self._call(self._cuda.cudaMemcpyAsync, target, source, num_bytes, kind, self._stream)
        self._call(self._cuda.cudaStreamSynchronize, self._stream)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a call gives; all of them give their error first."""
        error, *found = function(*arguments)
        self._check(error)
        return found[0] if found else None

    def _check(self, error: Any) -> None:
        if error != self._cuda.cudaError_t.cudaSuccess:
            is_full = error == self._cuda.cudaError_t.cudaErrorMemoryAllocation
            raise UserError(
                f"CUDA failed: {self._words(error)}.",
                "The GPU's memory is full: run smaller batches, or end what else uses it."
                if is_full
                else "It may be of an earlier call. If it stays when started anew, see what the engine "
                "needs: variator-export doctor BUNDLE",
            )

    def _words(self, error: Any) -> str:
        _, text = self._cuda.cudaGetErrorString(error)
        return f"{text.decode()} ({error.name})"


def _numpy_type(name: str) -> np.dtype[Any]:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes  # only values inside a graph have this type: outputs are float32

    return np.dtype(ml_dtypes.bfloat16)
