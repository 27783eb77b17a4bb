"""Sessions on engines. No GPU has executed this code yet; its names and arguments match those of TensorRT.

An engine that was only built, not verified, runs only if the user asks for it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from variator_export.bundle.engine_records import ANY_RATIO
from variator_export.bundle.files import BundleFiles
from variator_export.core.errors import UserError
from variator_export.core.gpu import Gpu, first_gpu
from variator_export.engines.added_plugin import (
    load_added_plugin,
    refuse_added_plugin,
    refuse_name_of_assembly,
)
from variator_export.engines.base import Arrays, check_inputs, choose_outputs
from variator_export.engines.choice import choose_engine, require_verified
from variator_export.engines.request import Profile
from variator_export.engines.target import Specialization
from variator_export.engines.tensorrt.api import FLAVOURS
from variator_export.engines.tensorrt.device import CudaDevice, Device
from variator_export.engines.tensorrt.execution import BoundContext, EngineContexts
from variator_export.engines.tensorrt.plan import open_engine
from variator_export.engines.tensorrt.plugin_inputs import plugin_tensors
from variator_export.engines.tensorrt.runtime_cache import runtime_cache
from variator_export.model.methods import method_of
from variator_export.model.plugin_layout import plugin_input_shapes, stack_for_graph

# A limit, because each CUDA graph has its own memory for the tensors between layers.
_MOST_GRAPHS = 8


class TensorRtSession:
    """A session on an engine of a bundle: the engine of one variant, or the any-ratio engine.

    Threads may share a session: it takes one call at a time. Calls on other sessions run beside it.

    Args:
        bundle: The bundle.
        target: `tensorrt-rtx` or `tensorrt`.
        variant: A ratio or a name; None for the any-ratio engine.
        allow_unverified: Run an engine that was built and never verified.
        lean_runtime: Library of the lean runtime of the TensorRT that built the engine, if the installed one
            is later.
        cuda_graphs: Record the work once for each shape and variant, and replay it, which leaves less work
            to the host. The last eight recordings are kept, each with its own memory.
        specialization: When TensorRT for RTX compiles kernels for the shapes of a call (`SessionOptions`).
            With `cuda_graphs` it is always before the first call of these shapes.
        fixed_profiles: Whether to use profiles for one shape alone.
        device: Device that holds the tensors; None for CUDA's current GPU.

    Attributes:
        device: Device that holds the tensors.

    Raises:
        UserError: The bundle has no such engine for this machine, the engine was not verified, or it cannot
            be opened.
    """

    def __init__(
        self,
        bundle: BundleFiles,
        target: str,
        variant: int | str | None = None,
        *,
        allow_unverified: bool = False,
        lean_runtime: Path | None = None,
        cuda_graphs: bool = False,
        specialization: Specialization = "lazy",
        fixed_profiles: bool = True,
        device: Device | None = None,
    ) -> None:
        self._bundle, self._backbone = bundle, bundle.manifest.backbone
        self._variant = None if variant is None else bundle.variant(variant)
        name = ANY_RATIO if self._variant is None else self._variant.name
        self._entry, sidecar = choose_engine(bundle, target, name)
        gpu = first_gpu()
        if not allow_unverified:
            require_verified(bundle, self._entry, gpu)
        profiles = [Profile.model_validate(profile) for profile in sidecar["profiles"]]
        self._profiles = [p for p in profiles if fixed_profiles or not p.is_fixed]
        if not fixed_profiles and len({p.is_fixed for p in profiles}) == 1:
            raise UserError(
                f"{self._entry.engine} has no profiles for one shape beside wide ones; its profiles: "
                f"{'; '.join(map(str, profiles))}.",
                "Name both in engine.profiles of the recipe, and compile the engine again.",
            )
        self.device = device or CudaDevice()
        _require_same_gpu(self.device, gpu)
        self._plan = open_engine(bundle, self._entry, sidecar, lean_runtime=lean_runtime)
        variants = bundle.manifest.variants if self._variant is None else ()
        self._graphs: dict[Any, BoundContext] = {}
        self._plugins: dict[str, dict[str, Any]] = {}
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        self._ratios = {} if self._variant is None else {self._variant.name: self._variant.ratio}
        # The engine has the original layers alone.
        for own in (variant for variant in variants if variant.assembly_spec is None):
            self._take(
                own.name, own.ratio, method_of(own).inputs_of(bundle, own, bundle.manifest.any_ratio_graph)
            )
        self._execution = EngineContexts(
            self._plan,
            profiles,
            self.device,
            target,
            self._entry.engine,
            runtime_cache(bundle, self._entry, self.device),
            specialization="eager" if cuda_graphs else specialization,
            fixed_profiles=fixed_profiles,
        )
        # TensorRT for RTX records CUDA graphs in its contexts, TensorRT on the stream.
        self._records_graphs = FLAVOURS[target].captures_cuda_graphs
        self._has_graphs = cuda_graphs
        bundle.check_unchanged()

    @property
    def ratios(self) -> tuple[int, ...]:
        """The ratios that the session runs, ascending."""
        return tuple(sorted({self._ratios[name] for name in self.names}))

    @property
    def names(self) -> tuple[str, ...]:
        """Names that the session runs: the bundle's variants, then the added plugins."""
        return tuple(self._ratios)

    def add_plugin(self, name: str, source: str | Path) -> None:
        """Add another plugin of the backbone, used from the next call on; nothing else is loaded.

        Raises:
            UserError: The session runs one variant alone, no profile of the engine covers the plugin's
                shapes, or `load_added_plugin` refuses the plugin. The session stays as it was.
        """
        if self._variant is not None:
            refuse_added_plugin(self._variant.name)
        refuse_name_of_assembly(self._bundle.manifest.variants, name)
        plugin = load_added_plugin(self._backbone, name, source, self._ratios.get(name))
        shapes = plugin_input_shapes(plugin.config)
        if not any(all(p.shapes[n][0] == shape for n, shape in shapes.items()) for p in self._profiles):
            raise UserError(
                f"No profile of {self._entry.engine} is for plugins of ratio {plugin.config.ratio} and "
                f"bottleneck {plugin.config.bottleneck_size}. It has {'; '.join(map(str, self._profiles))}.",
                "Build the plugin into the bundle, and compile its engine again.",
            )
        self._take(name, plugin.config.ratio, stack_for_graph(plugin))

    def _take(self, name: str, ratio: int, plugin: Mapping[str, np.ndarray]) -> None:
        """Upload a plugin and add it to the tables, between two calls.

        Recordings of a plugin of that name hold the addresses of its tensors, and are dropped.
        """
        tensors = plugin_tensors(plugin, self._plan.input_types)
        uploaded = {key: self.device.upload(array) for key, array in tensors}
        shapes = {key: array.shape for key, array in plugin.items()}
        with self.device.lock:
            self._graphs = {key: bound for key, bound in self._graphs.items() if key[0] != name}
            self._plugins = {**self._plugins, name: uploaded}
            self._shapes = {**self._shapes, name: shapes}
            self._ratios = {**self._ratios, name: ratio}

    def layers(self) -> list[Any]:
        """The engine's layers, as TensorRT's inspector lists them."""
        return self._plan.layers()

    def profile_shapes(self) -> list[tuple[int, int]]:
        """(batch_size, sequence_length) of each profile at its min, opt and max."""
        name = self._bundle.manifest.backbone.inputs[0]
        return [(shape[0], shape[1]) for profile in self._profiles for shape in profile.shapes[name]]

    def supports_shape(self, batch_size: int, sequence_length: int) -> bool:
        """Whether a profile covers inputs of this shape, at every ratio that the session runs."""
        names = self._bundle.manifest.backbone.inputs
        shapes = dict.fromkeys(names, (batch_size, sequence_length))
        plugins = list(self._shapes.values()) or [{}]
        return all(any(p.covers({**shapes, **plugin}) for p in self._profiles) for plugin in plugins)

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        ratio: int | str | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Arrays:
        """Run the model once.

        Args:
            inputs: int64 arrays (B, S), keyed by the backbone's input names.
            ratio: Ratio or name of a variant, or name of an added plugin. None for the session's variant, or
                for the default variant if the session runs all variants.
            outputs: Names of the outputs to copy to the host; None for all.

        Raises:
            UserError: The session has no such variant, no profile of the engine covers these shapes, or the
                model has no such output.
        """
        chosen = choose_outputs(outputs, self._plan.outputs)
        with self.device.lock:
            bound = self._bound(inputs, ratio)
            bound()
            return self.device.download_all({name: bound.outputs[name] for name in chosen})

    def run_on_device(
        self, inputs: Mapping[str, np.ndarray], ratio: int | str | None = None
    ) -> dict[str, Any]:
        """Run the model once, as `run` does, and leave the outputs on the device."""
        with self.device.lock:
            bound = self._bound(inputs, ratio)
            bound()
            if not self._has_graphs:
                return dict(bound.outputs)
            # A recording writes the outputs of its next replay into the same tensors.
            return {name: self.device.take(t, np.arange(t.shape[0])) for name, t in bound.outputs.items()}

    def prepare(self, inputs: Mapping[str, np.ndarray], ratio: int | str | None = None) -> Callable[[], None]:
        """Prepare a run for timing.

        The returned function enqueues a run on inputs that are already on the GPU, and leaves the outputs
        there. The function is valid until the next call of `run` or `prepare`; with CUDA graphs, until the
        next call with this variant and shape.
        """
        with self.device.lock:
            bound = self._bound(inputs, ratio)

        def enqueue() -> None:
            with self.device.lock:
                bound()

        return enqueue

    def _bound(self, inputs: Mapping[str, np.ndarray], ratio: int | str | None) -> BoundContext:
        name = self.find(ratio)
        arrays = check_inputs(inputs, self._backbone.part, self._backbone.max_length)
        shapes = {name: array.shape for name, array in arrays.items()} | self._shapes.get(name, {})
        if self._has_graphs:
            return self._recorded(name, arrays, shapes)
        return self._execution.bind(self._upload(name, arrays), shapes)

    def find(self, choice: int | str | None) -> str:
        """The name of the variant or the added plugin that a choice of `run` means.

        Raises:
            UserError: The session does not run it.
        """
        if self._variant is not None:
            if choice is not None and not self._variant.answers_to(choice):
                raise UserError(
                    f"This session runs {self._variant.name}, not {choice!r}.",
                    "Open a session for every ratio, without a variant.",
                )
            return self._variant.name
        if choice in self._ratios:
            return str(choice)
        asked = self._bundle.manifest.default_variant if choice is None else choice
        name = self._bundle.variant(asked).name
        if name not in self._ratios:
            raise UserError(
                f"{self._entry.engine} has the original layers alone; {name} is an assembly.",
                f"Open its own engine: variant={name!r}.",
            )
        return name

    def _upload(self, variant: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Upload the inputs, and add the plugin of a variant, which is already on the device."""
        inputs = {name: self.device.upload(array) for name, array in arrays.items()}
        return inputs | self._plugins.get(variant, {})

    def _recorded(
        self, variant: str, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]]
    ) -> BoundContext:
        """The recording for a variant and these shapes, with these inputs; created if it does not exist."""
        key = variant, tuple(tuple(shapes[name]) for name in arrays)
        bound = self._graphs.pop(key, None)
        if bound is None:
            if len(self._graphs) == _MOST_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            # A recording keeps the addresses of its tensors.
            inputs = self._upload(variant, arrays)
            bound = self._execution.record(inputs, shapes, by_context=self._records_graphs)
        else:
            for name, array in arrays.items():
                self.device.overwrite(bound.inputs[name], array)
        self._graphs[key] = bound  # the most recently used recording is dropped last
        return bound


def _require_same_gpu(device: Device, gpu: Gpu | None) -> None:
    """Check that this process runs on CUDA's first GPU: engines and records were chosen for that one."""
    if gpu is not None and device.name != gpu.name:
        raise UserError(
            f"This process has made {device.name} CUDA's current GPU, and the first one is {gpu.name}.",
            "Choose the GPU with CUDA_VISIBLE_DEVICES.",
        )
