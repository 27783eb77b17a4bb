"""Running engines. No GPU has executed this code yet; its names and arguments are compared with TensorRT's.

An engine that was only built is not run unless that is asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from variator_export.core.bundle_files import BundleFiles
from variator_export.core.engine_records import ANY_RATIO
from variator_export.core.environment import Gpu, first_gpu
from variator_export.core.errors import UserError
from variator_export.core.manifest import EngineEntry
from variator_export.engines.base import Arrays, check_inputs
from variator_export.engines.tensorrt.api import FLAVOURS
from variator_export.engines.tensorrt.compatibility import can_run, this_machine
from variator_export.engines.tensorrt.device import Device, TorchCuda
from variator_export.engines.tensorrt.plan import OpenPlan
from variator_export.engines.tensorrt.request import Profile
from variator_export.model.plugin_file import load_variant_plugin
from variator_export.model.plugin_layout import stack_for_graph

# Each has its own memory for what lies between layers.
_MOST_GRAPHS = 8


@dataclass(frozen=True)
class _Bound:
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


class TensorRtSession:
    """An engine of a bundle: of one variant, or the one that runs every ratio.

    Args:
        bundle: The bundle.
        target: `tensorrt-rtx` or `tensorrt`.
        variant: A ratio or a name; None: the any-ratio engine.
        allow_unverified: Run an engine that was only built.
        trust_host_code: Let TensorRT run a program that a plan brings along (the lean runtime).
        cuda_graphs: Record the work once for each shape and variant, and replay it: less is left to the host.
            The last eight are kept, each with its own memory.
        device: Where tensors are; None: PyTorch's CUDA.

    Raises:
        UserError: The bundle has no such engine for this machine, nobody has verified it, or it cannot be
            opened.
    """

    def __init__(
        self,
        bundle: BundleFiles,
        target: str,
        variant: int | str | None = None,
        *,
        allow_unverified: bool = False,
        trust_host_code: bool = False,
        cuda_graphs: bool = False,
        device: Device | None = None,
    ) -> None:
        self._bundle = bundle
        self._variant = None if variant is None else bundle.variant(variant)
        name = ANY_RATIO if self._variant is None else self._variant.name
        self._entry, sidecar = choose_engine(bundle, target, name)
        gpu = first_gpu()
        if not allow_unverified:
            _require_verified(bundle, self._entry, gpu)
        self._profiles = [Profile.model_validate(profile) for profile in sidecar["profiles"]]
        self._device = device or TorchCuda()
        _require_same_gpu(self._device, gpu)
        variants = bundle.manifest.variants if self._variant is None else ()
        arrays = {v.name: stack_for_graph(load_variant_plugin(bundle, v)) for v in variants}
        self._plugins = {
            key: {name: self._device.upload(array) for name, array in plugin.items()}
            for key, plugin in arrays.items()
        }
        self._shapes = {key: {n: a.shape for n, a in plugin.items()} for key, plugin in arrays.items()}
        self._plan = OpenPlan(bundle, self._entry, sidecar, self._variant, trust_host_code=trust_host_code)
        self._target = target
        # TensorRT for RTX records in its contexts, TensorRT on the stream.
        self._records_graphs = FLAVOURS[target].records_graphs
        self._context = None if cuda_graphs else self._new_context(records_graphs=False)
        self._profile = 0
        self._graphs: dict[Any, _Bound] = {}
        bundle.check_unchanged()

    @property
    def ratios(self) -> tuple[int, ...]:
        """The ratios that it runs, ascending."""
        found = self._bundle.manifest.variants if self._variant is None else (self._variant,)
        return tuple(sorted({variant.ratio for variant in found}))

    def layers(self) -> list[Any]:
        """What TensorRT's inspector says of the engine's layers."""
        return self._plan.layers()

    def profile_shapes(self) -> list[tuple[int, int]]:
        """(batch_size, sequence_length) of each profile at its min, opt and max."""
        name = self._bundle.manifest.backbone.inputs[0]
        return [(shape[0], shape[1]) for profile in self._profiles for shape in profile.shapes[name]]

    def takes(self, batch_size: int, sequence_length: int) -> bool:
        """Whether a profile is for a shape of the inputs, at every ratio that it runs."""
        names = self._bundle.manifest.backbone.inputs
        shapes = dict.fromkeys(names, (batch_size, sequence_length))
        plugins = list(self._shapes.values()) or [{}]
        return all(any(_covers(p, {**shapes, **plugin}) for p in self._profiles) for plugin in plugins)

    def run(self, inputs: Mapping[str, np.ndarray], ratio: int | str | None = None) -> Arrays:
        """Run once.

        Args:
            inputs: int64 arrays (B, S) by the backbone's input names.
            ratio: The ratio or name of a variant; None: that of the session, or 1.

        Raises:
            UserError: The session has no such variant, or no profile of the engine is for these shapes.
        """
        bound = self._bound(inputs, ratio)
        bound()
        return {name: self._device.download(tensor) for name, tensor in bound.outputs.items()}

    def prepare(self, inputs: Mapping[str, np.ndarray], ratio: int | str | None = None) -> Callable[[], None]:
        """What enqueues it on inputs that are on the GPU already, and leaves the outputs there: for timing.

        It holds until the next call of `run` or `prepare`; with CUDA graphs, until the next one of this
        variant and shape.
        """
        return self._bound(inputs, ratio)

    def _bound(self, inputs: Mapping[str, np.ndarray], ratio: int | str | None) -> _Bound:
        asked = ratio if ratio is not None else (self._variant.name if self._variant else 1)
        variant = self._bundle.variant(asked)
        if self._variant is not None and variant.name != self._variant.name:
            raise UserError(
                f"This session runs {self._variant.name}, not {asked!r}.",
                "Open one for every ratio, without a variant.",
            )
        arrays = check_inputs(inputs, self._bundle.manifest.backbone)
        shapes = {name: array.shape for name, array in arrays.items()} | self._shapes.get(variant.name, {})
        if self._context is None:
            return self._recorded(variant.name, arrays, shapes)
        tensors = {name: self._device.upload(array) for name, array in arrays.items()}
        self._profile = self._choose_profile(self._context, self._profile, shapes)
        return self._bind(self._context, variant.name, tensors, shapes)

    def _choose_profile(self, context: Any, current: int, shapes: Mapping[str, Sequence[int]]) -> int:
        index = choose_profile(self._profiles, shapes)
        if index != current:
            done = context.set_optimization_profile_async(index, self._device.stream)
            self._require(done, f"the profile {self._profiles[index].name}")
        return index

    def _require(self, done: object, what: str) -> None:
        """TensorRT says False or None where it refuses."""
        if done is False or done is None:
            raise UserError(
                f"{self._target} refused {what} of {self._entry.engine}; its words are on standard error.",
                "Mostly the GPU's memory is full: run smaller batches, or end what else uses it.",
            )

    def _new_context(self, *, records_graphs: bool) -> Any:
        """Memory is taken for the profile in use, not for the largest one."""
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

    def _bind(
        self,
        context: Any,
        variant: str,
        inputs: Mapping[str, Any],
        shapes: Mapping[str, Sequence[int]],
    ) -> _Bound:
        """Give a context its shapes and addresses."""
        for name, tensor in {**inputs, **self._plugins.get(variant, {})}.items():
            self._require(context.set_input_shape(name, tuple(shapes[name])), f"the shape of {name}")
            self._require(context.set_tensor_address(name, tensor.data_ptr()), f"the address of {name}")
        outputs = {name: self._device.empty(context.get_tensor_shape(name)) for name in self._plan.outputs}
        for name, tensor in outputs.items():
            self._require(context.set_tensor_address(name, tensor.data_ptr()), f"the address of {name}")

        def enqueue() -> None:
            self._require(context.execute_async_v3(self._device.stream), f"a run on {dict(shapes)}")

        return _Bound(context, inputs, outputs, enqueue)

    def _recorded(
        self, variant: str, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]]
    ) -> _Bound:
        """What was recorded for a variant and these shapes, with other inputs; recorded first, if need be."""
        key = variant, tuple(tuple(shapes[name]) for name in arrays)
        bound = self._graphs.pop(key, None)
        if bound is None:
            if len(self._graphs) == _MOST_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            bound = self._record(variant, arrays, shapes)
        else:
            for name, array in arrays.items():
                self._device.overwrite(bound.inputs[name], array)
        self._graphs[key] = bound  # the last one that was used is the last one to go
        return bound

    def _record(
        self, variant: str, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]]
    ) -> _Bound:
        """A context of its own: what is recorded holds its addresses."""
        context = self._new_context(records_graphs=self._records_graphs)
        self._choose_profile(context, 0, shapes)
        inputs = {name: self._device.upload(array) for name, array in arrays.items()}
        bound = self._bind(context, variant, inputs, shapes)
        if self._records_graphs:
            return bound
        # TensorRT does at the first call after new shapes what cannot be recorded.
        bound()
        return _Bound(context, inputs, bound.outputs, self._device.record(bound.enqueue))


def _require_same_gpu(device: Device, gpu: Gpu | None) -> None:
    """Engines and records are of the GPU that nvidia-smi names first; CUDA may count in another order."""
    if gpu is not None and device.name != gpu.name:
        raise UserError(
            f"PyTorch runs on {device.name}, and nvidia-smi names {gpu.name} first.",
            "Set CUDA_DEVICE_ORDER=PCI_BUS_ID, and CUDA_VISIBLE_DEVICES to the one that is meant.",
        )


def _require_verified(bundle: BundleFiles, entry: EngineEntry, gpu: Gpu | None) -> None:
    """Refuse an engine that no GPU of this kind has verified, or that failed there."""
    records = bundle.engine_records(entry)
    here = [record for record in records if gpu is not None and record.gpu == gpu.name]
    if any(record.passed for record in here):
        return
    known = "; ".join(map(str, here or records)) or "was built and never verified on a device"
    where = "" if here or not records or gpu is None else f", and this is {gpu.name}"
    raise UserError(
        f"{bundle.path / entry.engine} {known}{where}.",
        f"Verify it here: variator-export verify {bundle.path} --target {entry.target}. To run it all the "
        "same: --allow-unverified (in Python allow_unverified=True).",
    )


def choose_engine(bundle: BundleFiles, target: str, name: str) -> tuple[EngineEntry, dict[str, Any]]:
    """The engine of a variant that this machine can run, and its sidecar.

    Raises:
        UserError: There is none.
    """
    place = this_machine()
    reasons = []
    for entry in bundle.engines(target, name):
        sidecar = bundle.sidecar(entry)
        verdict = can_run(sidecar, place)
        if verdict.runs:
            return entry, sidecar
        reasons.append(f"{entry.engine}: {verdict.why}")
    if reasons:
        raise UserError(
            f"{bundle.path} has no engine of {name} for this machine. {'; '.join(reasons)}.",
            f"variator-export doctor {bundle.path} says what to do for each.",
        )
    raise UserError(
        f"{bundle.path} has no engine of {name} for {target}.",
        f"Build it: variator-export compile {bundle.path} --target {target} --variant {name}",
    )


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]]) -> int:
    """The profile that is for these shapes: of several the one whose usual shape is nearest.

    Raises:
        UserError: There is none; names those there are.
    """
    fitting = [index for index, profile in enumerate(profiles) if _covers(profile, shapes)]
    if not fitting:
        given = {name: tuple(shape) for name, shape in shapes.items()}
        raise UserError(
            f"No profile of the engine is for the shapes {given}. It has {'; '.join(map(str, profiles))}.",
            "Compile the engine with such a set of shapes: engine.profiles in the recipe.",
        )
    return min(fitting, key=lambda index: _distance(profiles[index], shapes))


def _covers(profile: Profile, shapes: Mapping[str, Sequence[int]]) -> bool:
    return all(
        len(shapes[name]) == len(low)
        and all(a <= s <= b for a, s, b in zip(low, shapes[name], high, strict=True))
        for name, (low, _, high) in profile.shapes.items()
    )


def _distance(profile: Profile, shapes: Mapping[str, Sequence[int]]) -> float:
    """How far the usual shape is: the sum of the logarithms of all ratios of dimensions."""
    pairs = (
        (o, s) for name, (_, opt, _) in profile.shapes.items() for o, s in zip(opt, shapes[name], strict=True)
    )
    return sum(abs(float(np.log(usual / given))) for usual, given in pairs)
