"""Tensors for other libraries, without a copy: DLPack, by https://dmlc.github.io/dlpack/latest/c_api.html."""

import atexit
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# DLDeviceType
CPU, CUDA = 1, 2
# DLDataTypeCode, by numpy's kind; bfloat16 is a type of its own.
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
_BFLOAT16 = 4
_NAME = b"dltensor"


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    pass


_DELETER = ctypes.CFUNCTYPE(None, ctypes.POINTER(_ManagedTensor))
_ManagedTensor._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _DELETER))
_DESTRUCTOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, _DESTRUCTOR)
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, (ctypes.c_void_p, ctypes.c_char_p)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_char_p)

# What consumers hold, by the address of the managed tensor: its memory, and what to do when they let it go.
_held: dict[int, tuple[Any, ...]] = {}


# Of a process that ends: what consumers let go of now is freed with the process.
_ending: list[bool] = []
atexit.register(_ending.append, True)


def _let_go(managed: Any, held: dict[int, tuple[Any, ...]] = _held, ending: list[bool] = _ending) -> None:
    if not ending:
        held.pop(ctypes.addressof(managed.contents))[-1]()


def _drop(capsule: int, ending: list[bool] = _ending) -> None:
    if not ending and _is_valid(capsule, _NAME):  # nobody took it
        _let_go(ctypes.cast(_pointer(capsule, _NAME), ctypes.POINTER(_ManagedTensor)))


_deleter, _destructor = _DELETER(_let_go), _DESTRUCTOR(_drop)
# Never freed, not even at the end of the process: consumers call them whenever they let go.
for _function in (_deleter, _destructor):
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_function))


def to_capsule(
    pointer: int,
    shape: Sequence[int],
    dtype: np.dtype[Any],
    device: tuple[int, int],
    on_release: Callable[[], object],
) -> Any:
    """A DLPack capsule of contiguous memory.

    Args:
        pointer: Address of the memory.
        shape: Shape of the tensor.
        dtype: Type of the elements.
        device: DLPack's kind of the device, and its number.
        on_release: Called when the consumer lets go of the memory. It keeps the memory alive until then.
    """
    code = _BFLOAT16 if dtype.name == "bfloat16" else _CODES[dtype.kind]
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    managed = _ManagedTensor()
    managed.tensor.data = pointer
    managed.tensor.device = _Device(*device)
    managed.tensor.ndim = len(shape)
    managed.tensor.dtype = _DataType(code, dtype.itemsize * 8, 1)
    managed.tensor.shape = ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = _deleter
    address = ctypes.addressof(managed)
    _held[address] = managed, sizes, on_release
    return _new(address, _NAME, _destructor)
