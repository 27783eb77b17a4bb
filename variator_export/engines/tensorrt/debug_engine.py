"""Debug engines: built from changed copies of a graph and run like an engine of a bundle, to inspect it.

No GPU has executed this code yet: the engines were built, but only a stand-in ran them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import EngineEntry
from variator_export.core.parts import DECODER
from variator_export.engines.base import Arrays, check_inputs
from variator_export.engines.request import Profile, request_of
from variator_export.engines.target import OnProgress
from variator_export.engines.tensorrt.building.builder_process import build_engine
from variator_export.engines.tensorrt.device import CudaDevice, Device, numpy_type
from variator_export.engines.tensorrt.execution import EngineContexts, choose_profile
from variator_export.engines.tensorrt.plan import OpenPlan
from variator_export.engines.tensorrt.plugin_inputs import plugin_tensors

_GRAPH = "changed.onnx"


class Rebuilder:
    """Builder of engines with the options of an engine of a bundle and the TensorRT installed here.

    Args:
        bundle: The bundle.
        entry: The engine to inspect.
        sidecar: Sidecar of the engine, which holds its build options.
        constant: Inputs that stay the same from call to call (`plugin_layout.stack_for_graph`).

    Raises:
        UserError: The machine has no GPU.
    """

    def __init__(
        self,
        bundle: BundleFiles,
        entry: EngineEntry,
        sidecar: Mapping[str, Any],
        constant: Mapping[str, np.ndarray],
    ) -> None:
        self._bundle, self._entry, self._sidecar, self._constant = bundle, entry, sidecar, constant
        self._backbone = bundle.manifest.backbone
        self._device: Device = CudaDevice()

    def open(
        self, model: ir.Model, inputs: Mapping[str, np.ndarray], on_progress: OnProgress | None = None
    ) -> Callable[[], Arrays]:
        """Build an engine of a graph.

        Args:
            model: A changed copy of the engine's graph.
            inputs: The graph's inputs, whose shapes a profile of the engine covers.
            on_progress: Called with the progress of the build.

        Returns:
            A function that runs the new engine on these inputs.

        Raises:
            UserError: The engine cannot be built or opened.
        """
        if self._entry.is_shared:  # given by `verify`, perhaps in a wider type
            types = {t.name: numpy_type(t.dtype) for t in self._backbone.parts[DECODER].inputs}
            inputs = {name: array.astype(types[name]) for name, array in inputs.items()}
        else:
            inputs = check_inputs(inputs, self._backbone.part, self._backbone.max_length)
        arrays = {**inputs, **self._constant}
        shapes = {name: array.shape for name, array in arrays.items()}
        profiles = [Profile.model_validate(profile) for profile in self._sidecar["profiles"]]
        profile = profiles[choose_profile(profiles, shapes)]
        what = f"{self._entry.variant} with other outputs"
        with TemporaryDirectory() as folder:
            # Save a copy of the weights: parsers refuse files in other folders, also if links lead to them.
            ir.save(model, Path(folder) / _GRAPH, external_data="changed.data")
            request = request_of(self._sidecar, _GRAPH, what, (profile,))
            content = build_engine(request, Path(folder), on_progress).content
        plan = OpenPlan(self._entry.target, content, what, "Verify it without --bisect.")
        given = {**inputs, **dict(plugin_tensors(self._constant, plan.input_types))}
        # Compiled for the shapes before the call, as those that `verify` runs.
        execution = EngineContexts(
            plan, [profile], self._device, self._entry.target, what, specialization="eager"
        )

        def run() -> Arrays:
            tensors = {name: self._device.upload(array) for name, array in given.items()}
            with self._device.lock:
                bound = execution.bind(tensors, shapes)
                bound()
                return {name: self._device.download(tensor) for name, tensor in bound.outputs.items()}

        return run
