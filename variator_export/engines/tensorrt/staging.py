"""Page-locked memory of the host, through which arrays are copied to a GPU and back.

From other memory, CUDA copies in parts, through page-locked memory of its own, and waits for each. To
allocate page-locked memory takes long, and it cannot be swapped out. So blocks are kept and used again, and
results are copied out of them.
"""

import ctypes
import threading
from collections.abc import Callable

import numpy as np

# The smallest block, and the largest: what is larger is copied without staging.
_LEAST, _MOST = 4 << 10, 64 << 20  # bytes


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
    """Blocks of page-locked memory. A block is used again only when the copies from it or to it are done.

    Args:
        allocate: Function from a size in bytes to the address of page-locked memory.
        free: Function that frees the memory at an address.
    """

    def __init__(self, allocate: Callable[[int], int], free: Callable[[int], object]) -> None:
        self._allocate, self._free = allocate, free
        self._idle: dict[int, list[Block]] = {}
        self._busy: list[Block] = []
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Block | None:
        """A block for a copy of so many bytes, busy until `done`; None for copies that need no block."""
        if not 0 < num_bytes <= _MOST:
            return None
        size = max(_LEAST, 1 << (num_bytes - 1).bit_length())
        with self._lock:
            idle = self._idle.setdefault(size, [])
            block = idle.pop() if idle else Block(self._allocate(size), size)
            self._busy.append(block)
        return block

    def done(self) -> None:
        """All copies are done: every block can be used again."""
        with self._lock:
            for block in self._busy:
                self._idle[block.size].append(block)
            self._busy.clear()

    def close(self) -> None:
        """Free all blocks."""
        for blocks in (*self._idle.values(), self._busy):
            for block in blocks:
                self._free(block.pointer)
            blocks.clear()
