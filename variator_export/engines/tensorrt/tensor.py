"""Tensors on a GPU, and what other libraries see of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from variator_export.engines.tensorrt import dlpack

if TYPE_CHECKING:
    from variator_export.engines.tensorrt.device import CudaDevice


class CudaTensor:
    """Memory on the GPU, freed when the last reference to the object is gone.

    Attributes:
        shape: Shape of the tensor.
        dtype: numpy type of the tensor; for bfloat16 the type of ml_dtypes.
    """

    def __init__(
        self, device: "CudaDevice", pointer: int, shape: Sequence[int], dtype: np.dtype[Any]
    ) -> None:
        self._device, self._pointer, self.shape, self.dtype = device, pointer, tuple(shape), dtype

    def data_ptr(self) -> int:
        """The address of the memory."""
        return self._pointer

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The memory for other libraries, by Numba's CUDA Array Interface 3; not for bfloat16.

        Readers that ignore `stream` (PyTorch does) would not wait for the work that writes the tensor. So
        this waits for it. Nothing waits for a reader that lets go while its own work still runs: DLPack does.
        """
        if self.dtype.name == "bfloat16":
            raise AttributeError("The CUDA Array Interface has no bfloat16: use DLPack.")
        self._device.synchronize()
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self._pointer, False),
            "stream": self._device.stream,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack's kind of the device, and its number."""
        return dlpack.CUDA, self._device.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """The memory for other libraries, by DLPack: `torch.from_dlpack(tensor)`.

        The consumer's stream waits for the work that writes the tensor. When the consumer lets go of the
        memory, it is freed after the work of that stream.

        Raises:
            BufferError: The consumer asks for a copy, or for the memory on another device.
        """
        del max_version  # a consumer of later versions takes the first one too
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("Only the memory itself can be had, on its own GPU.")
        consumer = 1 if stream is None else stream  # 1 is CUDA's default stream, -1 means not to wait
        if consumer != -1:
            self._device.show_to(consumer)

        def release(_memory: "CudaTensor" = self) -> None:
            if consumer != -1:
                self._device.take_back_from(consumer)

        return dlpack.to_capsule(self._pointer, self.shape, self.dtype, self.__dlpack_device__(), release)
