"""What stands for a GPU in tests: a device in the host's memory, and engines that are graphs."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from unittest import mock

import numpy as np
import onnxruntime


class Computes(Protocol):
    """An execution context."""

    def compute(self) -> None:
        """Do what was recorded."""
        ...


class HostTensor:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def data_ptr(self) -> int:
        return id(self)


class HostGpu:
    """A device in the host's memory: what nobody holds is gone, what is recorded runs when it is replayed."""

    stream, name = 0, "a GPU"

    def __init__(self) -> None:
        self.there: weakref.WeakValueDictionary[int, HostTensor] = weakref.WeakValueDictionary()
        self.recording: list[Computes] | None = None
        self.replays = 0

    def upload(self, array: np.ndarray) -> HostTensor:
        tensor = HostTensor(array.copy())
        self.there[tensor.data_ptr()] = tensor
        return tensor

    def empty(self, shape: Sequence[int], dtype: str) -> HostTensor:
        return self.upload(np.full(tuple(shape), np.nan if dtype.startswith("float") else 1, dtype))

    def overwrite(self, tensor: HostTensor, array: np.ndarray) -> None:
        tensor.values[...] = array

    def download(self, tensor: HostTensor) -> np.ndarray:
        return tensor.values.copy()

    def take(self, tensor: HostTensor, rows: np.ndarray) -> HostTensor:
        return self.upload(tensor.values[rows])

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        recorded: list[Computes] = []
        self.recording = recorded
        enqueue()
        self.recording = None

        def replay() -> None:
            self.replays += 1
            for context in recorded:
                context.compute()

        return replay


class OpenGraph:
    """In the place of an open plan: the graph that it was built of."""

    trt = mock.MagicMock()
    create_runtime_config = mock.MagicMock

    def __init__(self, content: bytes | str, device: HostGpu) -> None:
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.device = device
        self.types = {value.name: value.type for value in self.session.get_outputs()}
        self.outputs = list(self.types)
        self.engine = self

    def get_tensor_dtype(self, name: str) -> Any:
        names = {"float": "FLOAT", "float16": "HALF", "bool": "BOOL", "int64": "INT64"}
        return type("dtype", (), {"name": names[self.types[name].removeprefix("tensor(").rstrip(")")]})

    def create_execution_context(self, _: object) -> "Context":
        return Context(self)

    def last_messages(self) -> str:
        return "nothing"

    def layers(self) -> list[Any]:
        return []


class BoundContext:
    """What every execution context is told of its tensors."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, _index: int, _stream: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True


class Context(BoundContext):
    """Knows the shapes of its outputs once all inputs are there, as TensorRT's does."""

    def __init__(self, plan: OpenGraph) -> None:
        super().__init__()
        self.plan = plan

    def _run(self) -> dict[str, np.ndarray]:
        there = self.plan.device.there
        session = self.plan.session
        # Inputs with a default value: an engine has none of those.
        values = [*session.get_inputs(), *session.get_overridable_initializers()]
        inputs = {v.name: there[self.addresses[v.name]].values for v in values}
        assert {name: array.shape for name, array in inputs.items()} == self.shapes
        return dict(zip(self.plan.outputs, self.plan.session.run(None, inputs), strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._run()[name].shape

    def execute_async_v3(self, _: int) -> bool:
        for name, array in self._run().items():
            self.plan.device.there[self.addresses[name]].values[...] = array
        return True
