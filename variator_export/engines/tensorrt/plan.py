"""Opening of an engine file. A plan is executable code, so it is checked before TensorRT sees it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variator_export.bundle.engine_sources import engine_sources
from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import BACKBONE_WEIGHTS, EngineEntry
from variator_export.core.errors import UserError
from variator_export.core.precision import BFLOAT16, FLOAT16, FLOAT32
from variator_export.engines.choice import compile_command
from variator_export.engines.compatibility import how_to_get_lean_runtime, is_same_version
from variator_export.engines.tensorrt.api import load_tensorrt, require_tensorrt
from variator_export.engines.tensorrt.log import last_messages, make_log
from variator_export.engines.tensorrt.plan_header import plan_contradicts
from variator_export.model.methods import engine_tensors

# Types of inputs and outputs: TensorRT's names to the common names.
TYPES = {
    **{p.tensorrt: p.dtype for p in (FLOAT32, FLOAT16, BFLOAT16)},
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


class OpenPlan:
    """A plan opened by TensorRT.

    Args:
        target: `tensorrt-rtx` or `tensorrt`.
        plan: Content of the plan file.
        what: Name of the plan in messages.
        remedy: Hint for the user if TensorRT cannot open the plan.
        lean_runtime: Library of the lean runtime of the TensorRT that built the plan; None to open the plan
            with the installed TensorRT.

    Attributes:
        trt: The TensorRT module.
        engine: The deserialised engine.
        outputs: Names of the engine's outputs.
        input_types: Types of the engine's inputs by name.

    Raises:
        UserError: TensorRT cannot open the plan.
    """

    def __init__(
        self, target: str, plan: bytes, what: str, remedy: str, *, lean_runtime: Path | None = None
    ) -> None:
        self.trt = trt = load_tensorrt(target)
        self._log = make_log(trt)
        # An engine needs its runtime, and a lean runtime the one that loaded it. Python drops them in the
        # order in which they are named here.
        self.engine: Any = None
        self._lean: Any = None
        self._runtime = runtime = trt.Runtime(self._log)
        if lean_runtime is not None:
            self._lean = runtime = runtime.load_runtime(str(lean_runtime))
            if runtime is None:
                raise UserError(
                    f"{target} cannot load the lean runtime {lean_runtime}. In its own words:\n  "
                    f"{self.last_messages()}",
                    "Name libnvinfer_lean.so of the TensorRT that built the engine.",
                )
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise UserError(
                f"{target} cannot open {what}. In its own words:\n  {self.last_messages()}", remedy
            )
        self.engine = engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.outputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        self.input_types = {
            name: TYPES[engine.get_tensor_dtype(name).name] for name in names if name not in self.outputs
        }

    def last_messages(self) -> str:
        """The last errors that TensorRT reported."""
        return last_messages(self._log)

    def layers(self) -> list[Any]:
        """The engine's layers, as TensorRT's inspector lists them (`layers.precision_in_engine`)."""
        inspector = self.engine.create_engine_inspector()
        told = json.loads(inspector.get_engine_information(self.trt.LayerInformationFormat.JSON))
        found: list[Any] = told.get("Layers", [])
        return found

    def refit(self, graph: Path) -> str | None:
        """Put the weights of a graph into an engine that has none; returns the reason if that fails."""
        refitter = self.trt.Refitter(self.engine, self._log)
        parser = self.trt.OnnxParserRefitter(refitter, self._log)
        if not parser.refit_from_file(str(graph)):
            errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            return last_messages(self._log, "\n  ".join(errors))
        if missing := refitter.get_missing_weights():
            return f"the graph has none for {', '.join(missing[:3])}"
        return None if refitter.refit_cuda_engine() else self.last_messages()


def open_engine(
    bundle: BundleFiles,
    entry: EngineEntry,
    sidecar: Mapping[str, Any],
    *,
    lean_runtime: Path | None,
) -> OpenPlan:
    """Open an engine of a bundle, and put in the weights if it was built without them.

    Args:
        bundle: The bundle.
        entry: The engine.
        sidecar: Sidecar of the engine.
        lean_runtime: Library of the lean runtime of the TensorRT that built the engine. It is used only if
            another version is installed.

    Raises:
        UserError: The file contradicts its sidecar, TensorRT cannot open it, a later TensorRT is installed
            and no lean runtime given, or the bundle's weights are not those of the build.
    """
    path = bundle.path / entry.engine
    content = bundle.file(entry.engine).read_bytes()  # `bundle.file` compares the hash
    if wrong := plan_contradicts(content, entry.target, entry.version):
        raise UserError(
            f"{path}: its sidecar says {entry.target} {entry.version}, and {wrong}.",
            "Do not use it: get the bundle again from where it was built.",
        )
    installed = require_tensorrt(entry.target)
    library = None
    if not is_same_version(entry.version, installed):
        if lean_runtime is None:
            raise UserError(
                f"{path} was built by {entry.target} {entry.version}, and {installed} is installed: a later "
                "version opens it with the lean runtime of the one that built it.",
                how_to_get_lean_runtime(sidecar),
            )
        # Absolute, because the loader looks for a bare name elsewhere.
        library = Path(lean_runtime).resolve()
        if not library.is_file():
            raise UserError(f"There is no file {lean_runtime}.", how_to_get_lean_runtime(sidecar))
    remedy = f"variator-export doctor {bundle.path} prints what the engine needs."
    plan = OpenPlan(entry.target, content, str(path), remedy, lean_runtime=library)
    if sidecar["options"]["strip_weights"]:
        graph = _graph_of_weights(bundle, entry, sidecar["made_from"])
        if wrong := plan.refit(graph):
            raise UserError(
                f"{entry.target} cannot put the bundle's weights into {path}. In its own words:\n  {wrong}",
                f"Compile it with its weights: {_again(bundle, entry)} --with-weights",
            )
    return plan


def _again(bundle: BundleFiles, entry: EngineEntry) -> str:
    return compile_command(bundle, entry.target, entry.variant, entry.part)


def _graph_of_weights(bundle: BundleFiles, entry: EngineEntry, made_from: Mapping[str, Any]) -> Path:
    """The graph, which names the files of the weights.

    All sources must be those of the build, because TensorRT would accept other weights without noticing.
    """
    graph, manifest = bundle.graph_of_engine(entry), bundle.manifest
    tensors = engine_tensors(entry, entry.variant_in(manifest.variants), manifest.modules)
    now = engine_sources(graph, tensors, lambda name: manifest.files[name].sha256)
    names = {**dict.fromkeys(now, " or ".join(tensors)), "graph": graph, "weights": BACKBONE_WEIGHTS}
    for kind, found in now.items():
        if found != made_from.get(kind):
            raise UserError(
                f"{bundle.path / entry.engine} has no weights in it, and {names[kind]} is not the one that "
                "it was built with.",
                f"Compile it again: {_again(bundle, entry)}",
            )
    return bundle.graph(graph)
