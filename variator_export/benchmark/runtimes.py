"""Runtimes to time: every way to run a variant of a bundle that a user would really pick."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from variator_export.benchmark.speed_table import Macs, Subject
from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import Variant
from variator_export.core.environment import is_importable
from variator_export.core.errors import UserError
from variator_export.core.precision import find_precision
from variator_export.core.registry import resolve
from variator_export.engines.base import Runner
from variator_export.engines.target import SessionOptions
from variator_export.engines.targets import TARGETS, engine_targets
from variator_export.model.methods import method_of

if TYPE_CHECKING:
    from variator_export.benchmark.alternatives.setup import Setup
    from variator_export.model.backbone import Backbone


@dataclass(frozen=True)
class Runtime:
    """One way to run a variant.

    Attributes:
        group: Name of the group. Runtimes of one group are compared with each other.
        only_baseline: Whether the runtime runs only the baseline, as a user without plugins would.
        needs: The Python module that the runtime requires.
        gpu: Whether the runtime runs on a GPU, in a session as users open it: inputs and outputs are copied
            in each call. The group is the session's target.
        fixed_profiles: Whether engines use their profiles for one shape alone.
        opener: `module:function` that opens what users run instead of this package, from
            `alternatives.setup.Setup`. None for the bundle's own graphs, engines and eager models.
    """

    group: str
    only_baseline: bool
    needs: str
    gpu: bool = False
    fixed_profiles: bool = True
    opener: str | None = None


_ALTERNATIVES = "variator_export.benchmark.alternatives"


def _alternative(group: str, needs: str, opener: str) -> Runtime:
    return Runtime(group, only_baseline=True, needs=needs, opener=f"{_ALTERNATIVES}.{opener}")


RUNTIMES = {
    "eager": Runtime("torch", only_baseline=False, needs="torch"),
    "torch.compile": Runtime("torch", only_baseline=True, needs="torch"),
    "aot-inductor": _alternative("torch", "torch", "aot_inductor:aot_inductor"),
    "onnxruntime": Runtime("onnxruntime", only_baseline=False, needs="onnxruntime"),
    "any-ratio": Runtime("onnxruntime", only_baseline=False, needs="onnxruntime"),
    "torch.onnx": _alternative("onnxruntime", "torch", "exports:torch_onnx"),
    "onnxruntime-optimizer": _alternative("onnxruntime", "torch", "exports:optimizer"),
    "transformers-exporter": _alternative(
        "onnxruntime", "transformers", "transformers_exporter:transformers_exporter"
    ),
    "openvino": Runtime("openvino", only_baseline=False, needs="openvino"),
    "ctranslate2": _alternative("ctranslate2", "ctranslate2", "ctranslate2_runtime:in_float32"),
    # Groups of their own: their numbers are not those of float32.
    "quantize_dynamic": _alternative("quantize_dynamic", "torch", "exports:quantize_dynamic"),
    "openvino-nncf": _alternative("openvino-nncf", "nncf", "nncf_int8:openvino_nncf"),
    "torchao": _alternative("torchao", "torchao", "torchao_int8:torchao"),
    "ctranslate2-int8": _alternative("ctranslate2-int8", "ctranslate2", "ctranslate2_runtime:in_int8"),
}
# Sessions on every target that runs on a GPU, as users open them.
RUNTIMES |= {
    name: Runtime(name, only_baseline=False, needs=target.module, gpu=True)
    for name, target in TARGETS.all().items()
    if target.gpu
}
# Engines without their profiles for one shape alone, to show what those are worth.
RUNTIMES |= {
    f"{name}-wide": Runtime(name, only_baseline=False, needs=target.module, gpu=True, fixed_profiles=False)
    for name, target in engine_targets().items()
    if target.gpu
}
# What users run instead of this package.
ALTERNATIVES = tuple(name for name, runtime in RUNTIMES.items() if runtime.opener is not None)
# Runtimes that are left out if they cannot run, unless the user names them.
OPTIONAL_RUNTIMES = (*ALTERNATIVES, "torch.compile", "openvino")
TORCH_RUNTIMES = tuple(
    name for name, runtime in RUNTIMES.items() if runtime.group == "torch" and runtime.opener is None
)
# Runtimes that compile for each shape, in the first run.
COMPILED_RUNTIMES = ("torch.compile", "torchao")
# Runtimes that stay loaded from one opening to the next.
LASTING_RUNTIMES = (*TORCH_RUNTIMES, "torchao")
# Runtimes that run the files of a bundle.
OWN_RUNTIMES = tuple(name for name in RUNTIMES if name not in (*TORCH_RUNTIMES, *ALTERNATIVES))


class Subjects:
    """Opener of the subjects to be timed. A subject is one variant on one runtime.

    Args:
        files: The bundle.
        backbone: Function that loads the backbone. It is called at most once, when the first runtime that
            needs PyTorch is opened.
        scratch: Folder for graphs that are exported only for the comparison.
        options: Options of the sessions. PyTorch's threads are set by the caller, for the whole process.
        calibration: Texts for quantisations that need examples. Empty for the package's own few.
    """

    def __init__(
        self,
        files: BundleFiles,
        backbone: "Callable[[], Backbone]",
        scratch: Path,
        options: SessionOptions,
        calibration: Sequence[str] = (),
    ) -> None:
        self._files = files
        self._calibration = calibration
        self._load_backbone = backbone
        self._scratch = scratch
        self._sessions, self._threads = options, options.threads

    def open(self, runtime: str, variant: Variant) -> Subject:
        """Open one variant on one runtime.

        Raises:
            UserError: The runtime cannot run the variant here.
        """
        entry = RUNTIMES[runtime]
        runner = self._runner(runtime, variant)
        return Subject(runtime, entry.group, variant.ratio, variant.name, runner, baseline=variant.baseline)

    def open_again(self, runtime: str, variant: str) -> Subject:
        """Open a subject again that was opened before.

        Raises:
            UserError: The runtime can no longer run the variant here.
        """
        return self.open(runtime, self._files.variant(variant))

    def macs(self, subject: Subject, batch_size: int, sequence_length: int) -> Macs:
        """Return the multiply-accumulates of one call: by formula, and counted on the graph."""
        manifest = self._files.manifest
        variant = self._files.variant(subject.variant)
        size = manifest.backbone.encoder_size
        shape = (batch_size, sequence_length)
        on_graph = None
        has_own_graph = subject.runtime in OWN_RUNTIMES and subject.runtime != "any-ratio"
        if has_own_graph and is_importable("onnx_ir"):
            from variator_export.graph.macs import graph_macs

            on_graph = graph_macs(self._files.file(variant.graph), *shape, subject.ratio)
        return Macs(method_of(variant).macs(size, variant, *shape), on_graph)

    def _runner(self, runtime: str, variant: Variant) -> Runner:
        entry = RUNTIMES[runtime]
        if runtime in TORCH_RUNTIMES:
            from variator_export.engines.eager import EagerModel

            return EagerModel.of_variant(
                self._eager,
                self._files,
                variant,
                attention="sdpa",
                compiled=runtime == "torch.compile",
            )
        if entry.gpu:
            options = dataclasses.replace(
                self._sessions, cuda_graphs=True, fixed_profiles=entry.fixed_profiles
            )
            return TARGETS.find(entry.group).open(self._files, variant.name, options)
        precision = self._files.manifest.precision
        if runtime == "openvino":
            return TARGETS.find(runtime).open(self._files, variant.name, self._sessions)
        kind = find_precision(precision)
        if not kind.on_a_cpu or (kind.is_half and entry.opener):
            raise UserError(
                f"{runtime} does not compute in {precision} on a CPU.",
                "Time a float32 bundle instead, or time this one with --runtime openvino or eager.",
            )
        if entry.opener:
            runner: Runner = resolve(entry.opener)(self._setup)
            return runner
        graph = self._files.graph(variant.graph)
        from variator_export.engines.onnxruntime.graph import OnnxRuntimeRunner

        if runtime == "any-ratio":
            shared = self._files.manifest.session_graph
            extra = method_of(variant).inputs_of(self._files, variant, shared)
            return OnnxRuntimeRunner(self._files.graph(shared), extra, threads=self._threads)
        return OnnxRuntimeRunner(graph, threads=self._threads)

    @cached_property
    def _setup(self) -> "Setup":
        from variator_export.benchmark.alternatives.setup import Setup
        from variator_export.text.tokenizer import TextEncoder
        from variator_export.verification.cases import DEFAULT_TEXTS

        entry = self._files.manifest.backbone
        encoder = TextEncoder(self._files.path, entry.max_length)
        examples = [
            encoder.encode([text], entry.inputs, entry.max_length, truncate=True)
            for text in self._calibration or DEFAULT_TEXTS
        ]
        return Setup(self._eager, self._scratch, self._threads, examples)

    @cached_property
    def _eager(self) -> "Backbone":
        return self._load_backbone()


@contextmanager
def open_subjects(
    files: BundleFiles,
    backbone: "Callable[[], Backbone]",
    options: SessionOptions | None = None,
    calibration: Sequence[str] = (),
) -> Iterator[Subjects]:
    """Yield `Subjects` with a scratch folder that is deleted at the end of the block."""
    with TemporaryDirectory() as scratch:
        yield Subjects(files, backbone, Path(scratch), options or SessionOptions(), calibration)


def available_runtimes() -> list[str]:
    """Return the CPU runtimes whose modules are installed. GPU runtimes must be named by the user."""
    return [name for name, runtime in RUNTIMES.items() if is_importable(runtime.needs) and not runtime.gpu]
