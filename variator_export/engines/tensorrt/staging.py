"""Page-locked memory of the host, through which arrays are copied to a GPU and back.

From other memory, CUDA copies in parts, through page-locked memory of its own, and waits for each. To
allocate page-locked memory takes long, and it cannot be swapped out. So blocks are kept and used again, and
results are copied out of them.
"""

import ctypes
import threading

import numpy as np

from variator_export.engines.tensorrt.host_memory import CudaHostMemory

# The smallest block, and the largest: what is larger is copied without staging.
_LEAST, _LARGEST = 4 << 10, 16 << 20  # bytes


class Block:
    """Page-locked memory for one copy.

    Attributes:
        pointer: Address of the memory.
        size: Bytes of the memory, a power of 2.
    """

    def __init__(self, pointer: int, size: int) -> None:
        self.pointer, self.size = pointer, size
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))

    def write(self, array: np.ndarray) -> None:
        """Copy an array into the memory."""
        self._bytes[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def read_into(self, array: np.ndarray) -> None:
        """Copy the memory into an array, which is contiguous."""
        array.reshape(-1).view(np.uint8)[:] = self._bytes[: array.nbytes]


class Staging:
    """Blocks of page-locked memory. Who takes a block gives it back, now or when the stream's work is done.

    Args:
        memory: Where the blocks come from.
    """

    def __init__(self, memory: CudaHostMemory) -> None:
        self._memory = memory
        self._idle: dict[int, list[Block]] = {}
        self._busy: list[tuple[object, Block]] = []
        # A finalizer may run while a block is taken.
        self._lock = threading.RLock()

    def take(self, num_bytes: int) -> Block | None:
        """A block for a copy of so many bytes; None for copies that need no block, or if there is none."""
        if not 0 < num_bytes <= _LARGEST:
            return None
        size = max(_LEAST, 1 << (num_bytes - 1).bit_length())
        with self._lock:
            self._reclaim()
            if idle := self._idle.get(size):
                return idle.pop()
        pointer = self._memory.allocate(size)
        return None if pointer is None else Block(pointer, size)

    def give_back(self, block: Block) -> None:
        """Give back a block whose copy is done."""
        with self._lock:
            self._idle.setdefault(block.size, []).append(block)

    def give_back_later(self, block: Block) -> None:
        """Give back a block whose copy is on the stream."""
        event = self._memory.record()
        with self._lock:
            self._busy.append((event, block))

    def _reclaim(self) -> None:
        """Take back the blocks whose copies are done. A stream's copies end in the order of their start."""
        done = 0
        for event, block in self._busy:
            if not self._memory.is_done(event):
                break
            self._memory.drop(event)
            self._idle.setdefault(block.size, []).append(block)
            done += 1
        del self._busy[:done]

    def close(self) -> None:
        """Free all blocks, whose copies must be done."""
        for event, block in self._busy:
            self._memory.drop(event)
            self.give_back(block)
        for blocks in self._idle.values():
            for block in blocks:
                self._memory.free(block.pointer)
        self._idle.clear()
        self._busy.clear()
