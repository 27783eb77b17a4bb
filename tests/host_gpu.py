"""What stands for a GPU in tests: a device in the host's memory, and engines that are graphs.

It is as strict as CUDA. Work is done when somebody waits for it, at the addresses of the time when it was
enqueued or recorded. Refused are: shapes outside of a profile, memory that is too small or was freed, a
context that is destroyed before its work is done, and calls without the lock of the stream.
"""

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import onnxruntime

from variator_export.core.errors import UserError
from variator_export.engines.request import Profile
from variator_export.engines.tensorrt.plan import TYPES

# Bytes between layers that a context needs for each element of its first input.
_BYTES_PER_ELEMENT = 64


class HostTensor:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def data_ptr(self) -> int:
        return id(self)


class HostGpu:
    """A device in the host's memory.

    Attributes:
        there: Tensors by address. A tensor that nobody holds is gone.
        cannot_record: Whether the work of engines cannot be recorded.
        replays: How often recorded work was run.
    """

    stream, name = 0, "a GPU"

    def __init__(self) -> None:
        self.there: weakref.WeakValueDictionary[int, HostTensor] = weakref.WeakValueDictionary()
        self.lock = threading.RLock()
        self.cannot_record = False
        self.replays = 0
        self._work: list[Callable[[], None]] = []
        self._violations: list[str] = []
        self._recording: list[Callable[[], None]] | None = None

    def require_lock(self) -> None:
        assert self.lock._is_owned(), "another thread could use the stream"  # type: ignore[attr-defined]

    def enqueue(self, context: "BoundContext") -> None:
        """Put the run of a context on the stream."""
        self.require_lock()
        call = context.call()
        if self._recording is not None:
            self._recording.append(call)
            return
        tensors = [self.there[address] for address in context.addresses.values()]  # held until the run
        alive = weakref.ref(context)

        def run() -> None:
            assert alive() is not None, "a context was destroyed before its work was done"
            assert tensors
            call()

        self._work.append(run)

    def synchronize(self) -> None:
        with self.lock:
            if self._recording is not None:
                return
            work, self._work = self._work, []
            for run in work:
                try:
                    run()
                except AssertionError as error:
                    self._violations.append(str(error))
            # Again in the next call, because Python ignores what a finalizer raises.
            assert not self._violations, self._violations[0]

    def upload(self, array: np.ndarray) -> HostTensor:
        self.synchronize()
        tensor = HostTensor(array.copy())
        self.there[tensor.data_ptr()] = tensor
        return tensor

    def empty(self, shape: Sequence[int], dtype: str) -> HostTensor:
        assert self._recording is None, "memory would be a part of the recording"
        tensor = HostTensor(np.full(tuple(shape), np.nan if dtype.startswith("float") else 1, dtype))
        self.there[tensor.data_ptr()] = tensor
        return tensor

    def overwrite(self, tensor: HostTensor, array: np.ndarray) -> None:
        self.synchronize()
        tensor.values[...] = array

    def download(self, tensor: HostTensor) -> np.ndarray:
        self.synchronize()
        return tensor.values.copy()

    def download_all(self, tensors: Mapping[str, HostTensor]) -> dict[str, np.ndarray]:
        return {name: self.download(tensor) for name, tensor in tensors.items()}

    def take(self, tensor: HostTensor, rows: np.ndarray) -> HostTensor:
        return self.upload(self.download(tensor)[rows])

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        self.synchronize()
        recorded: list[Callable[[], None]] = []
        self._recording = recorded
        try:
            enqueue()
        finally:
            self._recording = None
        if self.cannot_record:
            raise UserError("CUDA failed: the stream cannot be recorded.", "Run without CUDA graphs.")

        def replay() -> None:
            self.require_lock()
            self.replays += 1
            self._work.extend(recorded)

        return replay


class BoundContext:
    """What every execution context is told of its tensors.

    Args:
        device: The device.
        profiles: Profiles of the engine; without any, every shape fits.
    """

    def __init__(self, device: HostGpu, profiles: Sequence[Profile] = ()) -> None:
        self.device, self.profiles, self.profile = device, profiles, 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory, self.memory_size = 0, 0

    def set_optimization_profile_async(self, index: int, _stream: int) -> bool:
        self.device.require_lock()
        if not 0 <= index < len(self.profiles):
            return False
        self.profile, self.shapes = index, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.device.require_lock()
        if self.profiles:
            ranges = self.profiles[self.profile].shapes.get(name)
            if ranges is not None and not all(
                low <= size <= high for low, size, high in zip(ranges[0], shape, ranges[2], strict=True)
            ):
                return False
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.device.require_lock()
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return _BYTES_PER_ELEMENT * int(np.prod(next(iter(self.shapes.values()))))

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory, self.memory_size = memory, size

    def execute_async_v3(self, _: int) -> bool:
        self.device.enqueue(self)
        return True

    def call(self) -> Callable[[], None]:
        """The run with the shapes and addresses of now, as CUDA records it."""
        shapes, addresses, memory = dict(self.shapes), dict(self.addresses), self.memory
        assert self.memory_size >= self.update_device_memory_size_for_shapes(), "too little memory"
        own = weakref.ref(self)
        # What is not recorded is freed after its work only.
        held = None if self.device._recording is not None else self.device.there[memory]

        def run() -> None:
            context = own()
            assert context is not None, "a context was destroyed before its work was done"
            there = context.device.there
            assert held is not None or memory in there, "the memory between layers was freed"
            gone = [name for name, address in addresses.items() if address not in there]
            assert not gone, f"{gone} were freed"
            context.compute(shapes, {name: there[address] for name, address in addresses.items()})

        return run

    def compute(self, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, HostTensor]) -> None:
        """Compute the outputs from the inputs."""
        raise NotImplementedError


class HostConfig:
    """The configuration of a context, with the kernels that were compiled for it.

    Attributes:
        compiled: What a context compiles when it is made.
        made: All configurations.
    """

    compiled = b"kernels"

    made: ClassVar[list["HostConfig"]] = []

    def __init__(self) -> None:
        self.cache = HostRuntimeCache()
        self.dynamic_shapes_kernel_specialization_strategy: Any = None
        self.made.append(self)

    def set_execution_context_allocation_strategy(self, _: object) -> None:
        """Contexts have no memory of their own here."""

    def create_runtime_cache(self) -> "HostRuntimeCache":
        return self.cache

    def set_runtime_cache(self, cache: "HostRuntimeCache") -> bool:
        cache.content = cache.content or self.compiled
        return True


class HostRuntimeCache:
    """Compiled kernels; what does not begin like them is of another version."""

    content = b""

    def deserialize(self, content: bytes) -> bool:
        fits = content.startswith(HostConfig.compiled)
        self.content = content if fits else b""
        return fits

    def serialize(self) -> bytes:
        return self.content


class OpenGraph:
    """In the place of an open plan: the graph that it was built of."""

    trt = mock.MagicMock()
    create_runtime_config = HostConfig

    def __init__(self, content: bytes | str, device: HostGpu, profiles: Sequence[Profile] = ()) -> None:
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.device, self.profiles = device, profiles
        self.types = {value.name: _type_name(value) for value in self.session.get_outputs()}
        self.outputs = list(self.types)
        given = [*self.session.get_inputs(), *self.session.get_overridable_initializers()]
        self.input_types = {value.name: TYPES[_type_name(value)] for value in given}
        self.engine = self

    def get_tensor_dtype(self, name: str) -> Any:
        return type("dtype", (), {"name": self.types[name]})

    def create_execution_context(self, _: object) -> "Context":
        return Context(self)

    def last_messages(self) -> str:
        return "nothing"

    def layers(self) -> list[Any]:
        return []


def _type_name(value: Any) -> str:
    """TensorRT's name of the type of an input or output."""
    names = {"float": "FLOAT", "float16": "HALF", "bool": "BOOL", "int64": "INT64"}
    return names[value.type.removeprefix("tensor(").rstrip(")")]


class Context(BoundContext):
    """Knows the shapes of its outputs once all inputs are there, as TensorRT's does."""

    def __init__(self, plan: OpenGraph) -> None:
        super().__init__(plan.device, plan.profiles)
        self.plan = plan

    def _run(
        self, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, HostTensor]
    ) -> dict[str, np.ndarray]:
        session = self.plan.session
        # Inputs with a default value: an engine has none of those.
        values = [*session.get_inputs(), *session.get_overridable_initializers()]
        inputs = {v.name: tensors[v.name].values for v in values}
        assert {name: array.shape for name, array in inputs.items()} == shapes
        return dict(zip(self.plan.outputs, session.run(None, inputs), strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        self.device.synchronize()
        there = {n: self.device.there[a] for n, a in self.addresses.items() if a in self.device.there}
        return self._run(self.shapes, there)[name].shape

    def compute(self, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, HostTensor]) -> None:
        for name, array in self._run(shapes, tensors).items():
            tensors[name].values[...] = array
