"""What every run of an engine needs: execution contexts, their profile, shapes and addresses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from variator_export.core.errors import UserError
from variator_export.core.precision import BFLOAT16, FLOAT16, FLOAT32
from variator_export.engines.request import Profile
from variator_export.engines.tensorrt.device import Device
from variator_export.engines.tensorrt.plan import OpenPlan

Shapes = Mapping[str, Sequence[int]]
# TensorRT's names of types that outputs may have, as others name them.
TYPES = {
    **{p.tensorrt: p.dtype for p in (FLOAT32, FLOAT16, BFLOAT16)},
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Bound:
    """An execution context with the shapes and addresses of one call; it keeps all of them alive.

    Attributes:
        enqueue: Puts the work on the device's stream.
    """

    context: Any
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    enqueue: Callable[[], None]

    def __call__(self) -> None:
        self.enqueue()


class Execution:
    """An engine that is open, and the device that its tensors are on.

    Args:
        plan: The engine.
        profiles: Its profiles, as it numbers them.
        device: Where tensors are.
        refuser: How messages call the target.
        what: How they call the engine.
    """

    def __init__(
        self, plan: OpenPlan, profiles: Sequence[Profile], device: Device, refuser: str, what: str
    ) -> None:
        self._plan, self._profiles, self._device = plan, profiles, device
        self._refuser, self._what = refuser, what

    def new_context(self, *, records_graphs: bool = False) -> Any:
        """A context, on profile 0. Memory is taken for the profile in use, not for the largest one.

        Args:
            records_graphs: Whether it records CUDA graphs itself, as those of TensorRT for RTX can.
        """
        trt, engine = self._plan.trt, self._plan.engine
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if records_graphs:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        self._require(context, "an execution context")
        return context

    def use_profile(self, context: Any, current: int, shapes: Shapes) -> int:
        """Put a context on the profile for these shapes; gives its number."""
        index = choose_profile(self._profiles, shapes)
        if index != current:
            done = context.set_optimization_profile_async(index, self._device.stream)
            self._require(done, f"the profile {self._profiles[index].name}")
        return index

    def bind(self, context: Any, inputs: Mapping[str, Any], shapes: Shapes) -> Bound:
        """Give a context its shapes and addresses.

        Args:
            context: On the right profile.
            inputs: All of them, on the device.
            shapes: Of the inputs.
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

        return Bound(context, inputs, outputs, enqueue)

    def _require(self, done: object, what: str) -> None:
        """TensorRT says False or None where it refuses."""
        if done is False or done is None:
            raise UserError(
                f"{self._refuser} refused {what} of {self._what}. In its own words:\n  {self._plan.words()}",
                "Mostly the GPU's memory is full: run smaller batches, or end what else uses it.",
            )


def choose_profile(profiles: Sequence[Profile], shapes: Shapes) -> int:
    """The profile that is for these shapes: of several the one whose usual shape is nearest.

    Raises:
        UserError: There is none; names those there are.
    """
    fitting = [index for index, profile in enumerate(profiles) if profile.covers(shapes)]
    if not fitting:
        given = {name: tuple(shape) for name, shape in shapes.items()}
        raise UserError(
            f"No profile of the engine is for the shapes {given}. It has {'; '.join(map(str, profiles))}.",
            "Compile the engine with such a set of shapes: engine.profiles in the recipe.",
        )
    return min(fitting, key=lambda index: _distance(profiles[index], shapes))


def _distance(profile: Profile, shapes: Shapes) -> float:
    """How far the usual shape is: the sum of the logarithms of all ratios of dimensions."""
    pairs = (
        (o, s) for name, (_, opt, _) in profile.shapes.items() for o, s in zip(opt, shapes[name], strict=True)
    )
    return sum(abs(float(np.log(usual / given))) for usual, given in pairs)
