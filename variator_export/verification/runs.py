"""What `verify` runs: the graphs of a bundle on ONNX Runtime, or its engines on this machine's GPU."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from variator_export.bundle.engine_records import ANY_RATIO
from variator_export.bundle.manifest import EngineEntry, Variant
from variator_export.core.environment import first_gpu, is_importable
from variator_export.core.errors import UserError
from variator_export.core.precision import find_precision
from variator_export.core.progress import PhaseBars, Progress
from variator_export.engines.base import Arrays, Runner
from variator_export.engines.choice import choose_engine
from variator_export.engines.layers import EnginePrecision, precision_in_engine
from variator_export.engines.target import EngineSession, EngineTarget, SessionOptions
from variator_export.model.methods import method_of
from variator_export.sessions import Bundle
from variator_export.verification.verified_graph import (
    how_it_runs,
    load_for_verification,
    open_changed,
    open_for_verification,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from variator_export.verification.bisect import BisectTarget


class Runs(Protocol):
    """Runs variants of a bundle.

    Attributes:
        ran: How, for reports.
        gpu: On which GPU; None: on the CPU.
    """

    ran: str
    gpu: str | None

    def precision(self, variant: Variant, /) -> EnginePrecision | None:
        """In which types what runs a variant computes, where that can be asked."""
        ...

    def runners(self, variant: Variant) -> dict[str, Runner]:
        """What runs a variant, by the file that it runs."""
        ...

    def shapes(self) -> list[tuple[int, int]]:
        """The smallest, the usual and the largest shapes that it is for."""
        ...

    def takes(self, file: str, batch_size: int, sequence_length: int, /) -> bool:
        """Whether inputs of a shape are among what a file is for."""
        ...

    def bisect_target(self, variant: Variant, file: str, progress: Progress, /) -> "BisectTarget":
        """What runs changed copies of the graph of a file, at a variant."""
        ...


class Graphs:
    """Each variant's own graph and the any-ratio graph, on the CPU."""

    gpu: str | None = None

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self.ran = how_it_runs(manifest.precision)
        self._bundle = bundle
        self._any_name = manifest.any_ratio_graph
        self._any_ratio = open_for_verification(bundle.graph(self._any_name), {}, manifest.precision)

    def runners(self, variant: Variant) -> dict[str, Runner]:
        """Its own graph, and the any-ratio graph with its plugin."""
        own = variant.graph
        return {
            own: open_for_verification(self._bundle.graph(own), {}, self._bundle.manifest.precision),
            self._any_name: self._any_ratio.with_plugin(method_of(variant).inputs_of(self._bundle, variant)),
        }

    def precision(self, _variant: Variant, /) -> EnginePrecision | None:
        """Of a graph it was counted when it was built."""
        return None

    def shapes(self) -> list[tuple[int, int]]:
        """Those of the profiles in the bundle's recipe, cut to the model's limit as engines are."""
        manifest = self._bundle.manifest
        found = [
            (batch_size, manifest.backbone.within_limit(length))
            for profile in manifest.recipe["engine"]["profiles"].values()
            for batch_size, length in zip(profile["batch_size"], profile["sequence_length"], strict=True)
        ]
        return list(dict.fromkeys(found))

    def takes(self, _file: str, _batch_size: int, _sequence_length: int, /) -> bool:
        """A graph takes every shape."""
        return True

    def bisect_target(self, variant: Variant, file: str, _progress: Progress, /) -> "BisectTarget":
        """On ONNX Runtime, as the graph itself."""
        from variator_export.verification.bisect import BisectTarget
        from variator_export.verification.reproduction import ONNXRUNTIME_SCRIPT

        bundle, precision = self._bundle, self._bundle.manifest.precision
        graph = bundle.graph(file)
        extra = method_of(variant).inputs_of(bundle, variant) if file == self._any_name else {}

        def open_(model: "ir.Model", inputs: Mapping[str, np.ndarray]) -> Callable[[], Arrays]:
            return functools.partial(open_changed(model, bundle.path, extra, precision).run, inputs)

        load = functools.partial(load_for_verification, graph, precision)
        return BisectTarget(file, "opened again", load, open_, extra, ONNXRUNTIME_SCRIPT)


class _AtRatio:
    """The any-ratio engine at one variant."""

    def __init__(self, session: EngineSession, variant: str) -> None:
        self._session, self._variant = session, variant

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run it once."""
        return self._session.run(inputs, self._variant)


class Engines:
    """The engines of a target that run on this machine: each variant's own and the any-ratio engine.

    Raises:
        UserError: There is no GPU, or no engine of a variant for it.
    """

    def __init__(
        self, bundle: Bundle, target: EngineTarget, variants: Sequence[Variant], *, trust_host_code: bool
    ) -> None:
        gpu = first_gpu()
        if gpu is None:
            raise UserError(
                "nvidia-smi knows of no GPU here.",
                "Verify engines where they are to run; graphs are verified without --target.",
            )
        self.gpu: str | None = gpu.name
        self.ran = f"as engines of {target.name} on {gpu.name}"
        self._bundle, self._target = bundle, target
        self._sessions: dict[str, EngineSession] = {}
        self._files: dict[str, str] = {}
        self._built: dict[str, tuple[EngineEntry, Mapping[str, Any]]] = {}
        missing: dict[str, UserError] = {}
        for name in (*(variant.name for variant in variants), ANY_RATIO):
            try:
                entry, sidecar = choose_engine(bundle, target.name, name)
            except UserError as error:  # of another GPU, say
                missing[name] = error
                continue
            if sidecar["options"]["tf32"] and not find_precision(bundle.manifest.precision).is_half:
                raise UserError(
                    f"{entry.engine} computes float32 products in TF32, with 10 bits of mantissa: by the "
                    "error of float32 it cannot pass.",
                    "Compile it without tf32; or run it as it is, with --allow-unverified.",
                )
            self._files[name] = entry.engine
            self._built[entry.engine] = entry, sidecar
            options = SessionOptions(allow_unverified=True, trust_host_code=trust_host_code)
            variant = None if name == ANY_RATIO else name
            self._sessions[entry.engine] = target.open_engine(bundle, variant, options)
        # One of the two is enough.
        for name, reason in missing.items():
            if name != ANY_RATIO and ANY_RATIO in missing:
                raise reason

    def shapes(self) -> list[tuple[int, int]]:
        """The smallest, the usual and the largest of each profile of each engine."""
        found = [shape for session in self._sessions.values() for shape in session.profile_shapes()]
        return list(dict.fromkeys(found))

    def runners(self, variant: Variant) -> dict[str, Runner]:
        """Its own engine, and the any-ratio engine with its plugin."""
        found: dict[str, Runner] = {}
        if (own := self._files.get(variant.name)) is not None:
            found[own] = self._sessions[own]
        if (file := self._files.get(ANY_RATIO)) is not None:
            found[file] = _AtRatio(self._sessions[file], variant.name)
        return found

    def precision(self, variant: Variant, /) -> EnginePrecision | None:
        """In which types a variant's own engine computes; None: it has none, or TensorRT does not say."""
        if (file := self._files.get(variant.name)) is None or not is_importable("onnx_ir"):
            return None
        from variator_export.graph.macs import macs_by_node

        precision = self._bundle.manifest.precision
        graph = self._bundle.graph(variant.graph)
        macs = macs_by_node(graph, variant.precision_proof.float32_modules, variant.ratio)
        return precision_in_engine(self._sessions[file].layers(), macs, precision)

    def takes(self, file: str, batch_size: int, sequence_length: int, /) -> bool:
        """Whether one of the engine's profiles is for a shape."""
        return self._sessions[file].takes(batch_size, sequence_length)

    def bisect_target(self, variant: Variant, file: str, progress: Progress, /) -> "BisectTarget":
        """As engines that are built on this machine, by what its sidecar says."""
        import onnx_ir as ir

        from variator_export.verification.bisect import BisectTarget

        bundle, (entry, sidecar) = self._bundle, self._built[file]
        any_ratio = entry.variant == ANY_RATIO
        graph = bundle.graph(bundle.manifest.any_ratio_graph if any_ratio else variant.graph)
        extra = method_of(variant).inputs_of(bundle, variant) if any_ratio else {}
        rebuilder = self._target.debug_engines(bundle, entry, sidecar, extra)

        def open_(model: "ir.Model", inputs: Mapping[str, np.ndarray]) -> Callable[[], Arrays]:
            with PhaseBars(progress, f"bisect {entry.variant}") as bars:
                return rebuilder.open(model, inputs, bars.tell)

        script = self._target.reproduction(sidecar)
        again = f"built again, by {entry.target} {self._target.version()}"
        return BisectTarget(file, again, functools.partial(ir.load, graph), open_, extra, script)
