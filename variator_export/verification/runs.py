"""Runs for `verify`: the graphs of a bundle on ONNX Runtime or another target, or its engines on a GPU."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from variator_export.bundle.engine_records import ANY_RATIO
from variator_export.bundle.manifest import EngineEntry, Variant
from variator_export.core.environment import is_importable
from variator_export.core.errors import UserError
from variator_export.core.gpu import first_gpu
from variator_export.core.parts import DECODER
from variator_export.core.precision import find_precision
from variator_export.core.progress import PhaseBars, Progress
from variator_export.engines.base import Arrays, Runner
from variator_export.engines.choice import choose_engine
from variator_export.engines.layers import EnginePrecision, precision_in_engine
from variator_export.engines.target import EngineSession, EngineTarget, SessionOptions, Target
from variator_export.engines.text_session import TextSession
from variator_export.generation.search import StepDecoder
from variator_export.model.methods import method_of
from variator_export.sessions import Bundle
from variator_export.verification.generation.decoder import DecoderRun, run_of_bundle
from variator_export.verification.stored_recipe import recipe_of
from variator_export.verification.verified_graph import (
    how_it_runs,
    load_for_verification,
    open_changed,
    open_for_verification,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from variator_export.verification.bisection.bisect import BisectSubject


class Runs(Protocol):
    """Protocol for running the variants of a bundle.

    Attributes:
        ran: How the files run, in words, for reports.
        gpu: Name of the GPU. None on the CPU.
    """

    ran: str
    gpu: str | None

    def precision(self, variant: Variant, /) -> EnginePrecision | None:
        """Return the types that a variant's engine computes in. None if the runtime cannot report them."""
        ...

    def runners(self, variant: Variant) -> dict[str, Runner]:
        """Return the runners of a variant, by the file that each runs."""
        ...

    def decoder_file(self, variant: Variant, /) -> str:
        """The file of a variant's decoder, of a model that generates text."""
        ...

    def decoder(self, variant: Variant, /) -> DecoderRun[StepDecoder]:
        """Open the decoder with a variant's encoder, of a model that generates text."""
        ...

    def graph_inputs(self, variant: Variant) -> dict[str, dict[str, np.ndarray]]:
        """Return the additional inputs of each graph of a variant, by file; empty for engines."""
        ...

    def shapes(self, *, largest: bool) -> list[tuple[int, int]]:
        """Return the smallest and the usual shapes of the profiles, and the largest ones if wanted."""
        ...

    def supports_shape(self, file: str, batch_size: int, sequence_length: int, /) -> bool:
        """Return whether a file accepts inputs of a shape."""
        ...

    def bisect_target(self, variant: Variant, file: str, progress: Progress, /) -> "BisectSubject":
        """Return a target that runs changed copies of a file's graph, with a variant's plugin."""
        ...


class Graphs:
    """Runs of each variant's own graph, and of those that take plugins as inputs, on the CPU."""

    gpu: str | None = None

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self.ran = how_it_runs(manifest.precision)
        self._bundle = bundle
        names = {name for variant in manifest.variants for name in manifest.shared_graphs(variant)}
        self._shared = {
            name: open_for_verification(bundle.graph(name), {}, manifest.precision) for name in sorted(names)
        }

    def runners(self, variant: Variant) -> dict[str, Runner]:
        """Return runners for the variant's own graph, and for those that take its plugin as inputs."""
        own = variant.graph
        return {
            own: open_for_verification(self._bundle.graph(own), {}, self._bundle.manifest.precision),
            **{
                name: self._shared[name].with_plugin(
                    self._inputs(variant, name), self._bundle.manifest.shared_outputs(variant, name)
                )
                for name in self._bundle.manifest.shared_graphs(variant)
            },
        }

    def _inputs(self, variant: Variant, graph: str) -> dict[str, np.ndarray]:
        return method_of(variant).inputs_of(self._bundle, variant, graph)

    def decoder_file(self, variant: Variant, /) -> str:
        """The decoder's graph."""
        return variant.decoder_graph

    def decoder(self, variant: Variant, /) -> DecoderRun[StepDecoder]:
        """Return the decoder's graph with the encoder's, each opened as it is verified."""
        return run_of_bundle(self._bundle, variant)

    def graph_inputs(self, variant: Variant) -> dict[str, dict[str, np.ndarray]]:
        """Return no inputs for the variant's own graph, and its plugin for the others."""
        shared = self._bundle.manifest.shared_graphs(variant)
        return {variant.graph: {}, **{name: self._inputs(variant, name) for name in shared}}

    def precision(self, _variant: Variant, /) -> EnginePrecision | None:
        """Return None: the build has already counted the types of each graph."""
        return None

    def shapes(self, *, largest: bool) -> list[tuple[int, int]]:
        """Return the shapes of the recipe's profiles, cut to the model's limit as for engines."""
        return _shapes_of_recipe(self._bundle, largest=largest)

    def supports_shape(self, _file: str, _batch_size: int, _sequence_length: int, /) -> bool:
        """Return True: a graph accepts every shape."""
        return True

    def bisect_target(self, variant: Variant, file: str, _progress: Progress, /) -> "BisectSubject":
        """Return a target on ONNX Runtime, opened the same way as the graph itself."""
        from variator_export.verification.bisection.bisect import BisectSubject
        from variator_export.verification.bisection.reproduction import ONNXRUNTIME_SCRIPT

        bundle, precision = self._bundle, self._bundle.manifest.precision
        graph = bundle.graph(file)
        takes_plugins = file in bundle.manifest.shared_graphs(variant)
        extra = self._inputs(variant, file) if takes_plugins else {}
        outputs = bundle.manifest.shared_outputs(variant, file)

        def open_(model: "ir.Model", inputs: Mapping[str, np.ndarray]) -> Callable[[], Arrays]:
            return functools.partial(open_changed(model, bundle.path, extra, precision, outputs).run, inputs)

        load = functools.partial(load_for_verification, graph, precision)
        return BisectSubject(file, "opened again", load, open_, extra, ONNXRUNTIME_SCRIPT)


class TargetGraphs:
    """Runs of each variant's own graph on another target that runs graphs as they are."""

    gpu: str | None = None

    def __init__(self, bundle: Bundle, target: Target) -> None:
        target.require(bundle)
        self._bundle, self._target = bundle, target
        versions = ", ".join(f"{n} {v}" for n, v in target.versions().items() if v is not None)
        self.ran = f"on {target.name} ({versions})" if versions else f"on {target.name}"

    def runners(self, variant: Variant) -> dict[str, Runner]:
        """Return the runner of the variant's own graph."""
        return {variant.graph: self._target.open(self._bundle, variant.name, SessionOptions())}

    def decoder_file(self, variant: Variant, /) -> str:
        """The decoder's graph."""
        return variant.decoder_graph

    def decoder(self, variant: Variant, /) -> DecoderRun[StepDecoder]:
        """Return the decoder's graph with the encoder's, in a session of the target."""
        session = self._target.open(self._bundle, variant.name, SessionOptions())
        assert isinstance(session, TextSession)
        start = functools.partial(session.start, ratio=variant.name)
        return DecoderRun(self.decoder_file(variant), lambda inputs, copies: start(inputs, copies=copies))

    def graph_inputs(self, variant: Variant) -> dict[str, dict[str, np.ndarray]]:
        """Return no inputs for the variant's own graph."""
        return {variant.graph: {}}

    def precision(self, _variant: Variant, /) -> EnginePrecision | None:
        """Return None: the runtime does not report the types that it computes in."""
        return None

    def shapes(self, *, largest: bool) -> list[tuple[int, int]]:
        """Return the shapes of the recipe's profiles, cut to the model's limit as for engines."""
        return _shapes_of_recipe(self._bundle, largest=largest)

    def supports_shape(self, _file: str, _batch_size: int, _sequence_length: int, /) -> bool:
        """Return True: a graph accepts every shape."""
        return True

    def bisect_target(self, _variant: Variant, _file: str, _progress: Progress, /) -> "BisectSubject":
        """Fail: `verify` refuses a bisection on this target."""
        raise AssertionError(self._target.name)


def _shapes_of_recipe(bundle: Bundle, *, largest: bool) -> list[tuple[int, int]]:
    manifest = bundle.manifest
    wanted = slice(None if largest else 2)
    found = [
        (batch_size, manifest.backbone.clamp_length(length))
        for profile in recipe_of(bundle).engine.profiles.values()
        for batch_size, length in [*zip(profile.batch_size, profile.sequence_length, strict=True)][wanted]
    ]
    return list(dict.fromkeys(found))


class _AtRatio:
    """Runner of the any-ratio engine with one variant's plugin."""

    def __init__(self, session: EngineSession, variant: str) -> None:
        self._session, self._variant = session, variant

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run the engine once."""
        return self._session.run(inputs, self._variant)


class Engines:
    """Runs of a target's engines on this machine: each variant's own engine and the any-ratio engine.

    Raises:
        UserError: The machine has no GPU, or a variant has no engine for it.
    """

    def __init__(
        self, bundle: Bundle, target: EngineTarget, variants: Sequence[Variant], *, lean_runtime: Path | None
    ) -> None:
        gpu = first_gpu()
        if gpu is None:
            raise UserError(
                "CUDA's driver finds no GPU on this machine.",
                "Verify engines on the machine that will run them; to verify the graphs, omit --target.",
            )
        self.gpu: str | None = gpu.name
        self.ran = f"as engines of {target.name} on {gpu.name}"
        self._bundle, self._target = bundle, target
        # Kernels for the shapes of each case, as those of a session that has run them for a while.
        self._options = SessionOptions(
            allow_unverified=True, lean_runtime=lean_runtime, specialization="eager"
        )
        self._open: dict[str, EngineSession] = {}
        self._files: dict[str, str] = {}
        self._built: dict[str, tuple[EngineEntry, Mapping[str, Any]]] = {}
        missing: dict[str, UserError] = {}
        for name in (*(variant.name for variant in variants), ANY_RATIO):
            try:
                entry, sidecar = choose_engine(bundle, target.name, name)
            except UserError as error:  # for example an engine of another GPU
                missing[name] = error
                continue
            self._take(entry, sidecar)
            self._files[name] = entry.engine
        # A variant needs only one of the two: its own engine or the any-ratio engine.
        for name, reason in missing.items():
            if name != ANY_RATIO and ANY_RATIO in missing:
                raise reason

    def _session(self, file: str) -> EngineSession:
        """The session on an engine.

        Two are open at a time, because each holds its weights: that of every ratio, and the last other one.
        """
        if file not in self._open:
            every, entry = self._files.get(ANY_RATIO), self._built[file][0]
            self._open = {f: s for f, s in self._open.items() if every in (f, file)}
            variant = None if entry.variant == ANY_RATIO else entry.variant
            self._open[file] = self._target.open_engine(self._bundle, variant, self._options)
        return self._open[file]

    def _take(self, entry: EngineEntry, sidecar: Mapping[str, Any]) -> None:
        if sidecar["options"]["tf32"] and not find_precision(self._bundle.manifest.precision).is_half:
            raise UserError(
                f"{entry.engine} computes float32 products in TF32, with 10 bits of mantissa, so it "
                "cannot pass the limit of float32.",
                "Compile it without tf32, or run it unverified with --allow-unverified.",
            )
        self._built[entry.engine] = entry, sidecar

    def shapes(self, *, largest: bool) -> list[tuple[int, int]]:
        """Return the smallest, the usual and, if wanted, the largest shape of each profile of each engine."""
        found = [
            shape
            for file in self._files.values()
            for index, shape in enumerate(self._session(file).profile_shapes())
            if largest or index % 3 < 2
        ]
        return list(dict.fromkeys(found))

    def runners(self, variant: Variant) -> dict[str, Runner]:
        """Return runners for the variant's own engine and the any-ratio engine, where they exist."""
        found: dict[str, Runner] = {}
        if (own := self._files.get(variant.name)) is not None:
            found[own] = self._session(own)
        if variant.assembly_spec is None and (file := self._files.get(ANY_RATIO)) is not None:
            found[file] = _AtRatio(self._session(file), variant.name)
        if not found:
            raise UserError(
                f"{variant.name} has no engine for {self._target.name}; the one for all ratios has the "
                "original layers alone.",
                f"Leave it out, or compile its own: variator-export compile {self._bundle.path} --variant "
                f"{variant.name}",
            )
        return found

    def decoder_file(self, variant: Variant, /) -> str:
        """The decoder's engine."""
        return choose_engine(self._bundle, self._target.name, variant.decoder_name, DECODER)[0].engine

    def decoder(self, variant: Variant, /) -> DecoderRun[StepDecoder]:
        """Return the decoder's engine, with the variant's own encoder or the one that runs every ratio."""
        file = self._files.get(variant.name) or self._files[ANY_RATIO]
        entry, sidecar = choose_engine(self._bundle, self._target.name, variant.decoder_name, DECODER)
        self._take(entry, sidecar)
        session = self._target.open_decoder(self._bundle, self._session(file), self._options)

        def supports(batch_size: int, length: int, copies: int, new_tokens: int) -> bool:
            rows = batch_size * copies
            return self.supports_shape(file, batch_size, length) and session.supports(
                rows, length, new_tokens, variant.name
            )

        def start(inputs: Arrays, copies: int) -> StepDecoder:
            return session.start(inputs, variant.name, copies)

        return DecoderRun(entry.engine, start, supports)

    def graph_inputs(self, _variant: Variant) -> dict[str, dict[str, np.ndarray]]:
        """Return nothing: engines are no graphs."""
        return {}

    def precision(self, variant: Variant, /) -> EnginePrecision | None:
        """Return the types that a variant's own engine computes in.

        None if the variant has no engine of its own, or if TensorRT does not report the types.
        """
        if (file := self._files.get(variant.name)) is None or not is_importable("onnx_ir"):
            return None
        from variator_export.graph.macs import macs_by_node

        precision = self._bundle.manifest.precision
        graph = self._bundle.graph(variant.graph)
        macs = macs_by_node(graph, variant.precision_proof.float32_modules, variant.ratio)
        return precision_in_engine(self._session(file).layers(), macs, precision)

    def supports_shape(self, file: str, batch_size: int, sequence_length: int, /) -> bool:
        """Return whether one of the engine's profiles covers a shape."""
        return self._session(file).supports_shape(batch_size, sequence_length)

    def bisect_target(self, variant: Variant, file: str, progress: Progress, /) -> "BisectSubject":
        """Return a target that builds engines on this machine, with the settings in the engine's sidecar."""
        from variator_export.graph.defaults import load_without_defaults
        from variator_export.verification.bisection.bisect import BisectSubject

        bundle, (entry, sidecar) = self._bundle, self._built[file]
        graph = bundle.graph(bundle.graph_of_engine(entry))
        shared = bundle.manifest.any_ratio_graph
        extra = method_of(variant).inputs_of(bundle, variant, shared) if entry.takes_plugins else {}
        rebuilder = self._target.debug_engines(bundle, entry, sidecar, extra)

        def open_(model: "ir.Model", inputs: Mapping[str, np.ndarray]) -> Callable[[], Arrays]:
            with PhaseBars(progress, f"bisect {file}") as bars:
                return rebuilder.open(model, inputs, bars.tell)

        script = self._target.reproduction(sidecar)
        again = f"built again, by {entry.target} {self._target.version()}"
        return BisectSubject(
            file, again, functools.partial(load_without_defaults, graph), open_, extra, script
        )
