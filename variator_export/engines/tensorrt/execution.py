"""Execution of an engine: contexts, and their profiles, shapes and addresses."""

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from variator_export.core.axes import InputShapes
from variator_export.core.errors import UserError
from variator_export.engines.request import Profile
from variator_export.engines.target import Specialization
from variator_export.engines.tensorrt.api import FLAVOURS
from variator_export.engines.tensorrt.device import Device
from variator_export.engines.tensorrt.plan import TYPES, OpenPlan
from variator_export.engines.tensorrt.runtime_cache import RuntimeCache


@dataclass(frozen=True)
class BoundContext:
    """An execution context with the shapes and addresses of one call; the object keeps them alive.

    Attributes:
        context: The execution context.
        inputs: Input tensors by name.
        outputs: Output tensors by name.
        memory: Memory for the tensors between layers.
        enqueue: Function that puts the work on the device's stream.
    """

    context: Any
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    memory: Any
    enqueue: Callable[[], None]

    def __call__(self) -> None:
        self.enqueue()


class EngineContexts:
    """An open engine, and the device that holds its tensors.

    Each profile that is used has a context: to change the profile of a context would cost time in each call,
    and leave it in neither if the change failed. The memory for tensors between layers has the size that the
    shapes of a call need, and is shared by all calls, because a stream runs them one after the other.

    The caller holds the device's lock from `bind` or `record` until the work is enqueued.

    Args:
        plan: The engine.
        profiles: The engine's profiles, in the engine's order.
        device: Device that holds the tensors.
        refuser: Name of the target in messages.
        what: Name of the engine in messages.
        cache: Compiled kernels of the engine; None if the engine holds them.
        specialization: When kernels for the shapes of a call are compiled, if the engine does not hold them.
        fixed_profiles: Whether to use profiles for one shape alone.
    """

    def __init__(
        self,
        plan: OpenPlan,
        profiles: Sequence[Profile],
        device: Device,
        refuser: str,
        what: str,
        cache: RuntimeCache | None = None,
        *,
        specialization: Specialization = "lazy",
        fixed_profiles: bool = True,
    ) -> None:
        self._plan, self._profiles, self._device = plan, profiles, device
        self._refuser, self._what = refuser, what
        self._contexts: dict[int, Any] = {}
        self._memory: Any = None
        self._cache = cache
        self._specialization = specialization if FLAVOURS[refuser].compiles_kernels else None
        self._fixed_profiles = fixed_profiles
        if cache is not None:
            weakref.finalize(self, cache.store)
        # A context must not be destroyed while its work runs.
        weakref.finalize(self, device.synchronize)

    def bind(self, inputs: Mapping[str, Any], shapes: InputShapes) -> BoundContext:
        """Set the shapes and addresses of a call; they hold until the next call.

        Args:
            inputs: All inputs of the engine, on the device.
            shapes: Shapes of the graph's inputs, which a profile has to cover.

        Raises:
            UserError: No profile of the engine covers the shapes, or TensorRT refuses them.
        """
        index = choose_profile(self._profiles, shapes, fixed=self._fixed_profiles)
        if index not in self._contexts:
            self._contexts[index] = self._new_context(index)
        return self._bind(self._contexts[index], inputs, shapes, self._shared_memory)

    def record(self, inputs: Mapping[str, Any], shapes: InputShapes, *, by_context: bool) -> BoundContext:
        """Record a call as a CUDA graph, with a context and memory of its own, whose addresses it keeps.

        A warning names the reason if the engine cannot be recorded. The call then runs without a CUDA graph.

        Args:
            inputs: As for `bind`.
            shapes: As for `bind`.
            by_context: Whether the context records and replays by itself, as contexts of TensorRT for RTX
                can. If not, the stream is recorded.

        Raises:
            UserError: As for `bind`.
        """
        index = choose_profile(self._profiles, shapes, fixed=self._fixed_profiles)
        context = self._new_context(index, captures_cuda_graphs=by_context)
        bound = self._bind(context, inputs, shapes, self._new_memory)
        if not by_context:
            # The first call after new shapes does work in TensorRT that cannot be recorded.
            bound()
            try:
                bound = replace(bound, enqueue=self._device.capture(bound.enqueue))
            except UserError as error:
                warnings.warn(
                    f"{self._what} runs without a CUDA graph on {dict(shapes)}: {error.message}",
                    stacklevel=2,
                )
        weakref.finalize(bound, self._device.synchronize)
        return bound

    def _new_context(self, profile: int, *, captures_cuda_graphs: bool = False) -> Any:
        """A context on a profile, whose memory is set for each call."""
        trt, engine = self._plan.trt, self._plan.engine
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if captures_cuda_graphs or self._cache is not None or self._specialization is not None:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if captures_cuda_graphs:
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            if self._specialization is not None:
                kinds = trt.DynamicShapesKernelSpecializationStrategy
                chosen = {"lazy": kinds.LAZY, "eager": kinds.EAGER, "none": kinds.NONE}[self._specialization]
                config.dynamic_shapes_kernel_specialization_strategy = chosen
            if self._cache is not None:
                self._cache.attach(config)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        self._require(context, "an execution context")
        if profile != 0:
            done = context.set_optimization_profile_async(profile, self._device.stream)
            self._require(done, f"the profile {self._profiles[profile].name}")
        return context

    def _bind(
        self,
        context: Any,
        inputs: Mapping[str, Any],
        shapes: InputShapes,
        allocate: Callable[[int], Any],
    ) -> BoundContext:
        for name, tensor in inputs.items():
            self._require(context.set_input_shape(name, tuple(tensor.shape)), f"the shape of {name}")
            self._require(context.set_tensor_address(name, tensor.data_ptr()), f"the address of {name}")
        engine, outputs = self._plan.engine, {}
        for name in self._plan.outputs:
            dtype = TYPES[engine.get_tensor_dtype(name).name]
            outputs[name] = self._device.empty(context.get_tensor_shape(name), dtype)
            self._require(
                context.set_tensor_address(name, outputs[name].data_ptr()), f"the address of {name}"
            )
        size = context.update_device_memory_size_for_shapes()
        memory = allocate(size)
        context.set_device_memory(memory.data_ptr(), size)

        def enqueue() -> None:
            self._require(context.execute_async_v3(self._device.stream), f"a run on {dict(shapes)}")

        return BoundContext(context, inputs, outputs, memory, enqueue)

    def _new_memory(self, num_bytes: int) -> Any:
        return self._device.empty((num_bytes,), "uint8")

    def _shared_memory(self, num_bytes: int) -> Any:
        """The largest memory that a call has needed so far. What it replaces is freed after its work."""
        if self._memory is None or self._memory.shape[0] < num_bytes:
            self._memory = None  # not both at once
            self._memory = self._new_memory(num_bytes)
        return self._memory

    def _require(self, done: object, what: str) -> None:
        """Raise an error if a call failed: TensorRT returns False or None if it refuses."""
        if done is False or done is None:
            raise UserError(
                f"{self._refuser} refused {what} of {self._what}. In its own words:\n  "
                f"{self._plan.last_messages()}",
                "Usually the GPU's memory is full: run smaller batches, or end other programs that use it.",
            )


def choose_profile(profiles: Sequence[Profile], shapes: InputShapes, *, fixed: bool = True) -> int:
    """The profile for these shapes; if several fit, the profile whose usual shape (opt) is nearest.

    Of two that are equally near, it is one for these shapes alone, unless `fixed` leaves those out.

    Raises:
        UserError: No profile fits. The message lists the profiles of the engine.
    """
    fitting = [i for i, p in enumerate(profiles) if p.covers(shapes) and (fixed or not p.is_fixed)]
    if not fitting:
        given = {name: tuple(shape) for name, shape in shapes.items()}
        raise UserError(
            f"No profile of the engine is for the shapes {given}. It has {'; '.join(map(str, profiles))}.",
            "Compile the engine with a set of shapes that fits: engine.profiles in the recipe.",
        )
    return min(fitting, key=lambda i: (_distance(profiles[i], shapes), not profiles[i].is_fixed))


def _distance(profile: Profile, shapes: InputShapes) -> float:
    """Distance to the usual shape: the sum of |log((usual + 1) / (given + 1))| over all dimensions.

    The 1 is for caches, which are empty at first.
    """
    pairs = (
        (o, s) for name, (_, opt, _) in profile.shapes.items() for o, s in zip(opt, shapes[name], strict=True)
    )
    return sum(abs(float(np.log((usual + 1) / (given + 1)))) for usual, given in pairs)
