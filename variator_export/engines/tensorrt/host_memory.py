"""The host's side of a CUDA stream: page-locked memory, and events that tell when copies are done."""

from typing import Any


class CudaHostMemory:
    """Page-locked memory for the copies of one stream.

    Errors are not raised: without such memory copies take longer, and what is wrong with the stream shows in
    its next call.

    Args:
        cuda: NVIDIA's bindings of the CUDA runtime.
        stream: The stream.
    """

    def __init__(self, cuda: Any, stream: Any) -> None:
        self._cuda, self._stream = cuda, stream

    def allocate(self, size: int) -> int | None:
        """The address of so many bytes; None if the host cannot lock them."""
        error, *found = self._cuda.cudaHostAlloc(size, self._cuda.cudaHostAllocDefault)
        return int(found[0]) if error == self._cuda.cudaError_t.cudaSuccess else None

    def free(self, pointer: int) -> None:
        """Free memory."""
        self._cuda.cudaFreeHost(pointer)

    def record(self) -> Any:
        """An event for the present work of the stream; None if there is none, and so no way to tell."""
        error, *found = self._cuda.cudaEventCreateWithFlags(self._cuda.cudaEventDisableTiming)
        if error != self._cuda.cudaError_t.cudaSuccess:
            return None
        self._cuda.cudaEventRecord(found[0], self._stream)
        return found[0]

    def is_done(self, event: Any) -> bool:
        """Whether the work before an event is done."""
        if event is None:
            return False
        return bool(self._cuda.cudaEventQuery(event)[0] == self._cuda.cudaError_t.cudaSuccess)

    def drop(self, event: Any) -> None:
        """Destroy an event."""
        if event is not None:
            self._cuda.cudaEventDestroy(event)
