"""TensorRT and TensorRT for RTX as targets."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import EngineEntry
from variator_export.core.errors import UserError
from variator_export.core.gpu import first_gpu
from variator_export.core.precision import FP8, INT8_STATIC, find_precision
from variator_export.engines.compatibility import AMPERE_PLUS, PORTABLE
from variator_export.engines.decoder import Decoder
from variator_export.engines.kernels import Schedule
from variator_export.engines.request import BuiltEngine, EngineRequest, TimingCacheMode
from variator_export.engines.target import (
    DebugEngines,
    EngineSession,
    EngineTarget,
    OnProgress,
    SessionOptions,
)
from variator_export.engines.tensorrt import api
from variator_export.engines.tensorrt.building.builder_process import build_engine
from variator_export.engines.tensorrt.building.timing_cache import timing_cache_path
from variator_export.engines.tensorrt.plan_header import (
    HEADER_BYTES,
    plan_contradicts,
    read_plan_version,
)
from variator_export.engines.tensorrt.schedule import schedule, scheduled_products
from variator_export.engines.text_session import TextSession
from variator_export.recipe.recipe import EngineRecipe

# The first compute capability with products in fp8 (Ada).
_FIRST_WITH_FP8 = 89


@dataclass(frozen=True)
class TensorRtTarget(EngineTarget):
    """A target for one of the TensorRT products in `api.FLAVOURS`."""

    name: str
    gpu: bool = True
    code: tuple[str, ...] = ("engines/tensorrt", "engines/request.py", "engines/graph_file.py")

    @property
    def flavour(self) -> api.Flavour:
        """The capabilities of this TensorRT."""
        return api.FLAVOURS[self.name]

    @property
    def module(self) -> str:  # type: ignore[override]
        """TensorRT's Python module."""
        return self.flavour.module

    @property
    def times_kernels(self) -> bool:  # type: ignore[override]
        """Whether it builds on the GPU of the machine."""
        return not self.flavour.portable

    @property
    def distributions(self) -> tuple[str, ...]:  # type: ignore[override]
        """The distribution that installs TensorRT."""
        return (self.flavour.distribution,)

    @property
    def probe(self) -> str:  # type: ignore[override]
        """A program that prints the version of TensorRT."""
        return f"import {self.module}; print({self.module}.__version__)"

    def require(self, bundle: BundleFiles) -> None:
        """Accept every bundle: TensorRT runs every precision."""

    def version(self) -> str:
        """The installed version."""
        return api.require_tensorrt(self.name)

    def check_options(self, options: EngineRecipe, timing_cache: TimingCacheMode) -> None:
        """Refuse options that this TensorRT does not have."""
        api.refuse_options(self.name, options, timing_cache)

    def check_precision(self, precision: str) -> None:
        """Refuse quantisations for CPUs: TensorRT takes only scales that are constant."""
        if find_precision(precision).quantization == "dynamic":
            raise UserError(
                f"{self.name} cannot build engines in {precision}: the graphs compute a scale for each "
                "token, and TensorRT takes only constant scales of activations.",
                "Build for CPUs alone (--target onnxruntime), or choose int8-float16, fp8, float16 or "
                "bfloat16 for GPUs.",
            )
        if find_precision(precision) is INT8_STATIC:
            raise UserError(
                f"{precision} is made for CPUs: with 7-bit weights, int8 embeddings and a float32 rest.",
                "Choose int8-float16 or fp8 for GPUs.",
            )

    def check_gpus(self, precision: str, options: EngineRecipe) -> None:
        """Refuse fp8 for GPUs before compute capability 8.9."""
        if find_precision(precision) is not FP8:
            return
        everything = {PORTABLE: self.flavour.portable, AMPERE_PLUS: ("sm80",)}
        for platform in self.platforms(options):
            names = everything.get(platform) or platform.split("+")
            if old := [name for name in names if int(name.removeprefix("sm")) < _FIRST_WITH_FP8]:
                able = [n for n in self.flavour.portable if int(n.removeprefix("sm")) >= _FIRST_WITH_FP8]
                raise UserError(
                    f"fp8 needs sm{_FIRST_WITH_FP8} or later; the engine would be for {', '.join(old)} too.",
                    f"Name later GPUs: engine.compute_capabilities: [{'+'.join(able)}] in the recipe, or "
                    f"compile --compute-capability {'+'.join(able)}; or choose int8-float16."
                    if able
                    else "Choose int8-float16, or build on a machine with a later GPU.",
                )

    def platforms(self, options: EngineRecipe) -> list[str]:
        """The named compute capabilities; if none is named: all, sm80 and later, or this machine's GPU."""
        if options.compute_capabilities:
            return list(options.compute_capabilities)
        if self.flavour.portable:
            return [PORTABLE]
        if options.hardware_compatibility == AMPERE_PLUS:
            return [AMPERE_PLUS]
        gpu = first_gpu()
        if gpu is None:
            raise UserError(
                f"The target {self.name} builds for the GPU of the machine, and CUDA's driver finds none "
                "here.",
                "Compile the bundle on the machine with the GPU: variator-export compile BUNDLE --target "
                f"{self.name}; or build for --target tensorrt-rtx, which needs no GPU.",
            )
        return [gpu.capability]

    def timing_cache(self, mode: TimingCacheMode) -> str | None:
        """The timing cache of this GPU, CUDA and TensorRT."""
        if mode == "ignore":
            return None
        gpu = first_gpu()
        if gpu is None:
            raise UserError(
                "A timing cache belongs to one GPU, and CUDA's driver finds none here.",
                "Leave out --timing-cache, or compile on the machine with the GPU.",
            )
        return str(timing_cache_path(gpu.name, api.cuda_version(self.name) or "", self.version()))

    def build(self, request: EngineRequest, folder: Path, on_progress: OnProgress | None) -> BuiltEngine:
        """Build the engine in a process of its own."""
        return build_engine(request, folder, on_progress)

    def products(self, engine: bytes) -> list[Any]:
        """The products in the schedule that a plan carries."""
        return scheduled_products(engine)

    def schedule(self, engine: bytes) -> Schedule | None:
        """The schedule that a plan of TensorRT for RTX carries."""
        return schedule(engine)

    def facts(self, engine: bytes) -> dict[str, str | None]:
        """The CUDA that TensorRT is built for, and the version in the plan's header."""
        return {"cuda": api.cuda_version(self.name), "plan_version": read_plan_version(engine)}

    def contradiction(self, engine: Path, version: str) -> str | None:
        """Compare the header of the plan; the rest is not read."""
        with engine.open("rb") as file:
            return plan_contradicts(file.read(HEADER_BYTES), self.name, version)

    def gpus(self, platform: str) -> str:
        """The compute capabilities of a platform."""
        if platform == PORTABLE:
            return ", ".join(self.flavour.portable)
        return "sm80 and later" if platform == AMPERE_PLUS else platform.replace("+", " and ")

    def runs_on(self, platform: str, capability: str) -> bool:
        """Whether the platform covers the compute capability."""
        if platform == PORTABLE:
            return capability in self.flavour.portable
        if platform == AMPERE_PLUS:
            return int(capability.removeprefix("sm")) >= 80
        return capability in platform.split("+")

    def how_to_build_for(self, capability: str) -> str:
        """Advice: name the GPU if the target can build for it by name, otherwise build on its machine."""
        again = f"variator-export compile BUNDLE --target {self.name}"
        known = self.flavour.compute_capabilities
        if known is None:
            return f"compile it on a machine with {capability}: {again}"
        if capability in known:
            return f"compile it for that GPU: {again} --compute-capability {capability}"
        return f"{self.name} does not support {capability}; compile it there with --target tensorrt"

    def open_engine(self, bundle: BundleFiles, variant: str | None, options: SessionOptions) -> EngineSession:
        """Open the engine of a variant, or the any-ratio engine."""
        from variator_export.engines.tensorrt.session import TensorRtSession

        return TensorRtSession(
            bundle,
            self.name,
            variant,
            allow_unverified=options.allow_unverified,
            lean_runtime=options.lean_runtime,
            cuda_graphs=options.cuda_graphs,
            specialization=options.specialization,
            fixed_profiles=options.fixed_profiles,
        )

    def open_decoder(
        self, bundle: BundleFiles, encoder: EngineSession, options: SessionOptions
    ) -> TextSession:
        """Open the engine of the decoder on the encoder's device."""
        from variator_export.engines.tensorrt.decoder import DecoderEngine
        from variator_export.engines.tensorrt.session import TensorRtSession

        assert isinstance(encoder, TensorRtSession)
        decoders: dict[str, Decoder] = {}
        for name in encoder.names:
            own = bundle.variant(name)
            if own.decoder_name not in decoders:
                engine = DecoderEngine(bundle, self.name, own.decoder_name, options, encoder.device)
                decoders[own.decoder_name] = Decoder(engine, bundle.manifest.backbone, own.assembly)
        return TextSession(bundle, encoder, decoders)

    def debug_engines(
        self,
        bundle: BundleFiles,
        entry: EngineEntry,
        sidecar: Mapping[str, Any],
        constant: Mapping[str, np.ndarray],
    ) -> DebugEngines:
        """A builder of debug engines that uses the TensorRT installed here."""
        from variator_export.engines.tensorrt.debug_engine import Rebuilder

        return Rebuilder(bundle, entry, sidecar, constant)

    def reproduction(self, sidecar: Mapping[str, Any]) -> str:
        """A program that uses PyTorch to manage the GPU's memory."""
        from variator_export.engines.tensorrt.reproduction_script import script_for_tensorrt

        return script_for_tensorrt(self.module, sidecar)


TENSORRT_RTX, TENSORRT = TensorRtTarget("tensorrt-rtx"), TensorRtTarget("tensorrt")
