"""The engine of a decoder, whose values stay on the GPU. No GPU has executed this code yet."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from variator_export.bundle.files import BundleFiles
from variator_export.core.axes import InputShapes
from variator_export.core.gpu import first_gpu
from variator_export.core.parts import DECODER
from variator_export.engines.choice import choose_engine, require_verified
from variator_export.engines.request import Profile
from variator_export.engines.target import SessionOptions
from variator_export.engines.tensorrt.device import Device
from variator_export.engines.tensorrt.execution import EngineContexts
from variator_export.engines.tensorrt.plan import open_engine
from variator_export.engines.tensorrt.runtime_cache import runtime_cache


class DecoderEngine:
    """The engine of a decoder of a bundle (`engines.decoder.DeviceRunner`).

    Args:
        bundle: The bundle.
        target: `tensorrt-rtx` or `tensorrt`.
        name: Name of the decoder (`Variant.decoder_name`).
        options: Options of the session. CUDA graphs are not recorded: each step has another shape.
        device: Device of the encoder's session, whose outputs the decoder reads.

    Raises:
        UserError: The bundle has no such engine for this machine, the engine was not verified, or it cannot
            be opened.
    """

    def __init__(
        self, bundle: BundleFiles, target: str, name: str, options: SessionOptions, device: Device
    ) -> None:
        entry, sidecar = choose_engine(bundle, target, name, DECODER)
        if not options.allow_unverified:
            require_verified(bundle, entry, first_gpu())
        self._profiles = [Profile.model_validate(profile) for profile in sidecar["profiles"]]
        self._device = device
        plan = open_engine(bundle, entry, sidecar, lean_runtime=options.lean_runtime)
        cache = runtime_cache(bundle, entry, device)
        # Each token has a new length: kernels for that length alone would be compiled before each.
        self._execution = EngineContexts(
            plan, self._profiles, device, target, entry.engine, cache, specialization="none"
        )

    def upload(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Copy arrays to the GPU."""
        return {name: self._device.upload(array) for name, array in arrays.items()}

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """A tensor on the GPU that holds nothing."""
        return self._device.empty(shape, dtype)

    def run_values(self, inputs: Mapping[str, np.ndarray], uploaded: Mapping[str, Any]) -> dict[str, Any]:
        """Run once, on arrays and on tensors on the GPU; the outputs stay there.

        Raises:
            UserError: No profile of the engine covers the shapes.
        """
        tensors = {**self.upload(inputs), **uploaded}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        with self._device.lock:
            bound = self._execution.bind(tensors, shapes)
            bound()
        return dict(bound.outputs)

    def take(self, value: Any, rows: np.ndarray) -> Any:
        """Some rows of a tensor, copied on the GPU."""
        return self._device.take(value, rows)

    def reorder(self, value: Any, rows: np.ndarray) -> Any:
        """Rows of a tensor in another order, copied on the GPU."""
        return self._device.take(value, rows)

    def download(self, value: Any) -> np.ndarray:
        """Copy a tensor from the GPU."""
        return self._device.download(value)

    def covers(self, shapes: InputShapes) -> bool:
        """Whether one of the engine's profiles covers these shapes."""
        return any(profile.covers(shapes) for profile in self._profiles)

    @property
    def limits(self) -> str:
        """The engine's profiles, in words."""
        return "; ".join(map(str, self._profiles))
