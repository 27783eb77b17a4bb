"""Execution of an engine: contexts, and their profiles, shapes and addresses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from variator_export.core.axes import InputShapes
from variator_export.core.errors import UserError
from variator_export.core.precision import BFLOAT16, FLOAT16, FLOAT32
from variator_export.engines.request import Profile
from variator_export.engines.tensorrt.device import Device
from variator_export.engines.tensorrt.plan import OpenPlan

# Types of outputs: TensorRT's names to the common names.
TYPES = {
    **{p.tensorrt: p.dtype for p in (FLOAT32, FLOAT16, BFLOAT16)},
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class BoundContext:
    """An execution context with the shapes and addresses of one call; the object keeps them alive.

    Attributes:
        context: The execution context.
        inputs: Input tensors by name.
        outputs: Output tensors by name.
        enqueue: Function that puts the work on the device's stream.
    """

    context: Any
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    enqueue: Callable[[], None]

    def __call__(self) -> None:
        self.enqueue()


class EngineContexts:
    """An open engine, and the device that holds its tensors.

    Args:
        plan: The engine.
        profiles: The engine's profiles, in the engine's order.
        device: Device that holds the tensors.
        refuser: Name of the target in messages.
        what: Name of the engine in messages.
    """

    def __init__(
        self, plan: OpenPlan, profiles: Sequence[Profile], device: Device, refuser: str, what: str
    ) -> None:
        self._plan, self._profiles, self._device = plan, profiles, device
        self._refuser, self._what = refuser, what

    def new_context(self, *, captures_cuda_graphs: bool = False) -> Any:
        """Create a context on profile 0. Memory is allocated for the profile in use, not for the largest one.

        Args:
            captures_cuda_graphs: Whether the context captures CUDA graphs itself, as contexts of TensorRT for
                RTX can.
        """
        trt, engine = self._plan.trt, self._plan.engine
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if captures_cuda_graphs:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        self._require(context, "an execution context")
        return context

    def use_profile(self, context: Any, current: int, shapes: InputShapes) -> int:
        """Switch a context to the profile for these shapes; returns the number of the profile."""
        index = choose_profile(self._profiles, shapes)
        if index != current:
            done = context.set_optimization_profile_async(index, self._device.stream)
            self._require(done, f"the profile {self._profiles[index].name}")
        return index

    def bind(self, context: Any, inputs: Mapping[str, Any], shapes: InputShapes) -> BoundContext:
        """Set the shapes and addresses of a context.

        Args:
            context: A context on the right profile.
            inputs: All input tensors, on the device.
            shapes: InputShapes of the inputs.
        """
        for name, tensor in inputs.items():
            self._require(context.set_input_shape(name, tuple(shapes[name])), f"the shape of {name}")
            self._require(context.set_tensor_address(name, tensor.data_ptr()), f"the address of {name}")
        engine, outputs = self._plan.engine, {}
        for name in self._plan.outputs:
            dtype = TYPES[engine.get_tensor_dtype(name).name]
            outputs[name] = self._device.empty(context.get_tensor_shape(name), dtype)
            self._require(
                context.set_tensor_address(name, outputs[name].data_ptr()), f"the address of {name}"
            )

        def enqueue() -> None:
            self._require(context.execute_async_v3(self._device.stream), f"a run on {dict(shapes)}")

        return BoundContext(context, inputs, outputs, enqueue)

    def _require(self, done: object, what: str) -> None:
        """Raise an error if a call failed: TensorRT returns False or None if it refuses."""
        if done is False or done is None:
            raise UserError(
                f"{self._refuser} refused {what} of {self._what}. In its own words:\n  "
                f"{self._plan.last_messages()}",
                "Usually the GPU's memory is full: run smaller batches, or end other programs that use it.",
            )


def choose_profile(profiles: Sequence[Profile], shapes: InputShapes) -> int:
    """The profile for these shapes; if several fit, the profile whose usual shape (opt) is nearest.

    Raises:
        UserError: No profile fits. The message lists the profiles of the engine.
    """
    fitting = [index for index, profile in enumerate(profiles) if profile.covers(shapes)]
    if not fitting:
        given = {name: tuple(shape) for name, shape in shapes.items()}
        raise UserError(
            f"No profile of the engine is for the shapes {given}. It has {'; '.join(map(str, profiles))}.",
            "Compile the engine with a set of shapes that fits: engine.profiles in the recipe.",
        )
    return min(fitting, key=lambda index: _distance(profiles[index], shapes))


def _distance(profile: Profile, shapes: InputShapes) -> float:
    """Distance to the usual shape: the sum of |log((usual + 1) / (given + 1))| over all dimensions.

    The 1 is for caches, which are empty at first.
    """
    pairs = (
        (o, s) for name, (_, opt, _) in profile.shapes.items() for o, s in zip(opt, shapes[name], strict=True)
    )
    return sum(abs(float(np.log((usual + 1) / (given + 1)))) for usual, given in pairs)
