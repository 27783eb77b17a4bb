"""Running engines. No GPU has executed this code yet; its names and arguments are compared with TensorRT's.

An engine that was only built is not run unless that is asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from variator_export.bundle.engine_records import ANY_RATIO
from variator_export.bundle.files import BundleFiles
from variator_export.core.environment import Gpu, first_gpu
from variator_export.core.errors import UserError
from variator_export.engines.added_plugin import load_added_plugin, refuse_added_plugin
from variator_export.engines.base import Arrays, check_inputs
from variator_export.engines.choice import choose_engine, require_verified
from variator_export.engines.request import Profile
from variator_export.engines.tensorrt.api import FLAVOURS
from variator_export.engines.tensorrt.device import CudaDevice, Device
from variator_export.engines.tensorrt.execution import Bound, Execution
from variator_export.engines.tensorrt.plan import open_engine
from variator_export.model.methods import method_of
from variator_export.model.plugin_layout import plugin_input_shapes, stack_for_graph

# Each has its own memory for what lies between layers.
_MOST_GRAPHS = 8


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
        device: Where tensors are; None: CUDA's current GPU.

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
        self._bundle, self._backbone = bundle, bundle.manifest.backbone
        self._variant = None if variant is None else bundle.variant(variant)
        name = ANY_RATIO if self._variant is None else self._variant.name
        self._entry, sidecar = choose_engine(bundle, target, name)
        gpu = first_gpu()
        if not allow_unverified:
            require_verified(bundle, self._entry, gpu)
        self._profiles = [Profile.model_validate(profile) for profile in sidecar["profiles"]]
        self._device = device or CudaDevice()
        _require_same_gpu(self._device, gpu)
        variants = bundle.manifest.variants if self._variant is None else ()
        self._plugins: dict[str, dict[str, Any]] = {}
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        self._ratios = {} if self._variant is None else {self._variant.name: self._variant.ratio}
        for own in variants:
            self._take(own.name, own.ratio, method_of(own).inputs_of(bundle, own))
        self._plan = open_engine(bundle, self._entry, sidecar, self._variant, trust_host_code=trust_host_code)
        self._execution = Execution(self._plan, self._profiles, self._device, target, self._entry.engine)
        # TensorRT for RTX records in its contexts, TensorRT on the stream.
        self._records_graphs = FLAVOURS[target].records_graphs
        self._context = None if cuda_graphs else self._execution.new_context()
        self._profile = 0
        self._graphs: dict[Any, Bound] = {}
        bundle.check_unchanged()

    @property
    def ratios(self) -> tuple[int, ...]:
        """The ratios that it runs, ascending."""
        return tuple(sorted({self._ratios[name] for name in self.names}))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what it runs: the bundle's variants, then the plugins that were added."""
        return tuple(self._ratios)

    def add_plugin(self, name: str, source: str | Path) -> None:
        """Take another plugin of the backbone, which counts from the next call on; nothing else is loaded.

        Raises:
            UserError: The session runs one variant alone, no profile of the engine is for the plugin's
                shapes, or as `load_added_plugin`; the session is as before.
        """
        if self._variant is not None:
            refuse_added_plugin(self._variant.name)
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
        """Tables are replaced whole: calls of other threads see the old ones or the new ones."""
        uploaded = {key: self._device.upload(array) for key, array in plugin.items()}
        self._plugins = {**self._plugins, name: uploaded}
        self._shapes = {**self._shapes, name: {key: array.shape for key, array in plugin.items()}}
        self._ratios = {**self._ratios, name: ratio}

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
        return all(any(p.covers({**shapes, **plugin}) for p in self._profiles) for plugin in plugins)

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

    def _bound(self, inputs: Mapping[str, np.ndarray], ratio: int | str | None) -> Bound:
        name = self._find(ratio)
        arrays = check_inputs(inputs, self._backbone.part, self._backbone.max_length)
        shapes = {name: array.shape for name, array in arrays.items()} | self._shapes.get(name, {})
        if self._context is None:
            return self._recorded(name, arrays, shapes)
        self._profile = self._execution.use_profile(self._context, self._profile, shapes)
        return self._execution.bind(self._context, self._upload(name, arrays), shapes)

    def _find(self, choice: int | str | None) -> str:
        """The name of what is to run."""
        if self._variant is not None:
            if choice not in (None, self._variant.name, self._variant.ratio):
                raise UserError(
                    f"This session runs {self._variant.name}, not {choice!r}.",
                    "Open one for every ratio, without a variant.",
                )
            return self._variant.name
        if choice in self._ratios:
            return str(choice)
        asked = self._bundle.manifest.baseline.name if choice is None else choice
        return self._bundle.variant(asked).name

    def _upload(self, variant: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The inputs, with the plugin of a variant, which is on the device already."""
        inputs = {name: self._device.upload(array) for name, array in arrays.items()}
        return inputs | self._plugins.get(variant, {})

    def _recorded(
        self, variant: str, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]]
    ) -> Bound:
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
    ) -> Bound:
        """A context of its own: what is recorded holds its addresses."""
        context = self._execution.new_context(records_graphs=self._records_graphs)
        self._execution.use_profile(context, 0, shapes)
        bound = self._execution.bind(context, self._upload(variant, arrays), shapes)
        if self._records_graphs:
            return bound
        # TensorRT does at the first call after new shapes what cannot be recorded.
        bound()
        return replace(bound, enqueue=self._device.record(bound.enqueue))


def _require_same_gpu(device: Device, gpu: Gpu | None) -> None:
    """Engines and records are of the GPU that nvidia-smi names first; CUDA may count in another order."""
    if gpu is not None and device.name != gpu.name:
        raise UserError(
            f"CUDA runs on {device.name}, and nvidia-smi names {gpu.name} first.",
            "Set CUDA_DEVICE_ORDER=PCI_BUS_ID, and CUDA_VISIBLE_DEVICES to the one that is meant.",
        )
