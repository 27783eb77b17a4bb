"""Running engines. No GPU has executed this code yet; its names and arguments are compared with TensorRT's.

Tensors lie in PyTorch's CUDA memory. A plan is executable code: it is not opened before its hash, its head
and its sidecar agree, and one that was only built is not run unless that is asked for.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from variator_export.core.bundle_files import BundleFiles
from variator_export.core.environment import require
from variator_export.core.errors import UserError
from variator_export.core.manifest import EngineEntry
from variator_export.engines.base import Arrays, check_inputs
from variator_export.engines.tensorrt.api import load_tensorrt
from variator_export.engines.tensorrt.compatibility import can_run, this_machine
from variator_export.engines.tensorrt.plan_header import plan_contradicts
from variator_export.engines.tensorrt.request import Profile
from variator_export.model.plugin_file import load_variant_plugin, stack_for_graph

ANY_RATIO = "any-ratio"
BUILT_ONLY = "built, not verified on a device"
_NEVER_EXECUTED = "no GPU has run the code that runs engines yet"


class Device(Protocol):
    """Where tensors are: PyTorch's CUDA, or what stands for it in tests."""

    def upload(self, array: np.ndarray) -> Any:
        """A tensor with these values; has `data_ptr()`."""
        ...

    def empty(self, shape: Sequence[int]) -> Any:
        """A float32 tensor for an output."""
        ...

    def download(self, tensor: Any) -> np.ndarray:
        """Its values, after everything on the stream is done."""
        ...

    @property
    def stream(self) -> int:
        """The handle of the CUDA stream that all work is on."""
        ...


class TorchCuda:
    """PyTorch's CUDA memory, on a stream of its own.

    Raises:
        UserError: PyTorch is not installed, or sees no GPU.
    """

    def __init__(self) -> None:
        require("torch", "export", "Running engines")
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                f"PyTorch {torch.__version__} sees no GPU here.",
                "Run engines where one is, with a PyTorch for CUDA; onnxruntime runs the bundle on a CPU.",
            )
        self._torch = torch
        self._stream = torch.cuda.Stream()

    def upload(self, array: np.ndarray) -> Any:
        """Copy an array to the GPU."""
        with self._torch.cuda.stream(self._stream):
            return self._torch.from_numpy(np.ascontiguousarray(array)).to("cuda", non_blocking=False)

    def empty(self, shape: Sequence[int]) -> Any:
        """Memory for a float32 output."""
        with self._torch.cuda.stream(self._stream):
            return self._torch.empty(tuple(shape), dtype=self._torch.float32, device="cuda")

    def download(self, tensor: Any) -> np.ndarray:
        """Wait for the stream and copy to the host."""
        self._stream.synchronize()
        values: np.ndarray = tensor.cpu().numpy()
        return values

    @property
    def stream(self) -> int:
        """Its handle."""
        return int(self._stream.cuda_stream)


class TensorRtSession:
    """An engine of a bundle: of one variant, or the one that runs every ratio.

    Args:
        bundle: The bundle.
        target: `tensorrt-rtx` or `tensorrt`.
        variant: A ratio or a name; None: the any-ratio engine.
        allow_unverified: Run an engine that was only built.
        trust_host_code: Let TensorRT run a program that a plan brings along (the lean runtime).
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
        device: Device | None = None,
    ) -> None:
        self._bundle = bundle
        self._variant = None if variant is None else bundle.variant(variant)
        name = ANY_RATIO if self._variant is None else self._variant.name
        self._entry, sidecar = choose_engine(bundle, target, name)
        if sidecar["status"] == BUILT_ONLY and not allow_unverified:
            raise UserError(
                f"{bundle.path / self._entry.engine} was built and never verified on a device.",
                "To run it all the same: --allow-unverified (in Python allow_unverified=True); "
                f"{_NEVER_EXECUTED}.",
            )
        self._profiles = [Profile.model_validate(profile) for profile in sidecar["profiles"]]
        self._device = device or TorchCuda()
        variants = bundle.manifest.variants if self._variant is None else ()
        arrays = {v.name: stack_for_graph(load_variant_plugin(bundle, v)) for v in variants}
        self._plugins = {
            key: {name: self._device.upload(array) for name, array in plugin.items()}
            for key, plugin in arrays.items()
        }
        self._shapes = {key: {n: a.shape for n, a in plugin.items()} for key, plugin in arrays.items()}
        self._open(bundle, target, trust_host_code)
        bundle.check_unchanged()

    def _open(self, bundle: BundleFiles, target: str, trust_host_code: bool) -> None:
        plan = bundle.file(self._entry.engine).read_bytes()  # whose hash is compared
        if wrong := plan_contradicts(plan, target, self._entry.version):
            raise UserError(
                f"{bundle.path / self._entry.engine}: its sidecar says {target} {self._entry.version}, and "
                f"{wrong}.",
                "Do not use it: get the bundle again from where it was built.",
            )
        trt = load_tensorrt(target)
        runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        if trust_host_code:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise UserError(
                f"{target} cannot open {bundle.path / self._entry.engine}; its words are on standard error.",
                f"variator-export doctor {bundle.path} says what the engine needs.",
            )
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._outputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        # The engine has to live as long as its context.
        self._runtime, self._engine = runtime, engine
        self._context = engine.create_execution_context()
        self._profile = 0

    @property
    def ratios(self) -> tuple[int, ...]:
        """The ratios that it runs, ascending."""
        found = self._bundle.manifest.variants if self._variant is None else (self._variant,)
        return tuple(sorted({variant.ratio for variant in found}))

    def run(self, inputs: Mapping[str, np.ndarray], ratio: int | str | None = None) -> Arrays:
        """Run once.

        Args:
            inputs: int64 arrays (B, S) by the backbone's input names.
            ratio: The ratio or name of a variant; None: that of the session, or 1.

        Raises:
            UserError: The session has no such variant, or no profile of the engine is for these shapes.
        """
        asked = ratio if ratio is not None else (self._variant.name if self._variant else 1)
        variant = self._bundle.variant(asked)
        if self._variant is not None and variant.name != self._variant.name:
            raise UserError(
                f"This session runs {self._variant.name}, not {asked!r}.",
                "Open one for every ratio, without a variant.",
            )
        arrays = check_inputs(inputs, self._bundle.manifest.backbone)
        plugin = self._plugins.get(variant.name, {})
        shapes = {name: array.shape for name, array in arrays.items()} | self._shapes.get(variant.name, {})
        index = choose_profile(self._profiles, shapes)
        if index != self._profile:
            self._context.set_optimization_profile_async(index, self._device.stream)
            self._profile = index
        tensors = {name: self._device.upload(array) for name, array in arrays.items()} | plugin
        for name, tensor in tensors.items():
            self._context.set_input_shape(name, tuple(shapes[name]))
            self._context.set_tensor_address(name, tensor.data_ptr())
        found = {name: self._device.empty(self._context.get_tensor_shape(name)) for name in self._outputs}
        for name, tensor in found.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._context.execute_async_v3(self._device.stream):
            raise UserError(
                f"The engine failed on the shapes {shapes}; TensorRT's words are on standard error.",
                "Check the GPU's memory.",
            )
        return {name: self._device.download(tensor) for name, tensor in found.items()}


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
