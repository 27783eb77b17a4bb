"""Where a session's tensors are: PyTorch's CUDA memory, or what stands for it in tests."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from variator_export.core.environment import require
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


class TorchCuda:
    """PyTorch's CUDA memory, on a stream of its own.

    Raises:
        UserError: PyTorch is not installed, or sees no GPU.
    """

    def __init__(self) -> None:
        require("torch", "export", "Running engines")
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                f"PyTorch {torch.__version__} sees no GPU here.",
                "Run engines where one is, with a PyTorch for CUDA; onnxruntime runs the bundle on a CPU.",
            )
        self._torch = torch
        self._stream = torch.cuda.Stream()

    def upload(self, array: np.ndarray) -> Any:
        """Copy an array to the GPU."""
        with self._on_stream():
            return self._torch.from_numpy(np.ascontiguousarray(array)).to("cuda", non_blocking=False)

    def overwrite(self, tensor: Any, array: np.ndarray) -> None:
        """Copy an array into a tensor."""
        with self._on_stream():
            tensor.copy_(self._torch.from_numpy(np.ascontiguousarray(array)))

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """Memory for an output."""
        with self._on_stream():
            return self._torch.empty(tuple(shape), dtype=getattr(self._torch, dtype), device="cuda")

    def download(self, tensor: Any) -> np.ndarray:
        """Wait for the stream and copy to the host."""
        with self._on_stream():
            values = tensor.cpu()  # waits: it is on the same stream
        return to_numpy(values)

    def record(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record the stream while the function enqueues."""
        graph = self._torch.cuda.CUDAGraph()
        # The outer block gives the caller's stream back where recording fails.
        with self._on_stream(), self._torch.cuda.graph(graph, stream=self._stream):
            enqueue()

        def replay() -> None:
            with self._on_stream():
                graph.replay()

        return replay

    @property
    def stream(self) -> int:
        """Its handle."""
        return int(self._stream.cuda_stream)

    @property
    def name(self) -> str:
        """Of PyTorch's current device."""
        return str(self._torch.cuda.get_device_name())

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        try:
            with self._torch.cuda.stream(self._stream):
                yield
        except RuntimeError as error:  # PyTorch's error for full memory is one
            raise UserError(
                f"PyTorch failed on {self.name}: {str(error).splitlines()[0]}",
                "Mostly the GPU's memory is full: run smaller batches, or end what else uses it.",
            ) from error


def to_numpy(tensor: Any) -> np.ndarray:
    """A tensor on the CPU as an array that shares its memory; bfloat16, which numpy lacks, by ml_dtypes."""
    if str(tensor.dtype) != "torch.bfloat16":
        found: np.ndarray = tensor.numpy()
        return found
    import ml_dtypes  # only values inside a graph have this type: outputs are float32
    import torch

    return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
