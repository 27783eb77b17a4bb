"""Benchmark of a finished bundle: every ratio and the alternatives that a user has, at several shapes."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variator_export.benchmark.measured import Measured
from variator_export.benchmark.profile import profile_rows
from variator_export.benchmark.runtimes import (
    COMPILED_RUNTIMES,
    RUNTIMES,
    Subjects,
    available_runtimes,
    open_subjects,
)
from variator_export.benchmark.schedule import (
    Shape,
    Timed,
    TimingSettings,
    open_all,
    run_once,
    time_everything,
)
from variator_export.benchmark.speed_table import Subject, break_even, speed_inputs, speed_rows
from variator_export.bundle.manifest import Variant
from variator_export.bundle.quality_report import quality_of_graphs
from variator_export.core.environment import (
    conditions,
    is_importable,
    machine,
    require,
    require_onnxruntime,
    versions,
)
from variator_export.core.errors import UserError
from variator_export.core.precision import find_precision
from variator_export.core.progress import Progress
from variator_export.engines.base import Arrays
from variator_export.engines.target import SessionOptions
from variator_export.engines.targets import distributions
from variator_export.sessions import Bundle
from variator_export.verification.eager_bundle import load_bundle_backbone

if TYPE_CHECKING:
    from variator_export.model.backbone import Backbone


# Libraries whose versions a result records, besides those of the targets.
_LIBRARIES = ("torch", "transformers", "openvino", "nncf", "torchao", "ctranslate2")


@dataclass(frozen=True)
class ShapeResult:
    """Result for all subjects at one shape.

    Attributes:
        batch_size: Number of rows.
        sequence_length: Tokens per row.
        settled: Whether the medians became stable before the rounds ran out, in every opening.
        settled_openings: Number of openings in which they did.
        rows: Rows of `benchmark.speed_table.speed_rows`.
        profiles: Time that each variant's graph spends in each kind of module on ONNX Runtime
            (`benchmark.profile.profile_rows`), if profiles were requested.
    """

    batch_size: int
    sequence_length: int
    settled: bool
    settled_openings: int
    rows: Sequence[Mapping[str, Any]]
    profiles: Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Benchmark(Measured):
    """Result of `bench`.

    Attributes:
        shapes: Results by shape, in the order in which the shapes were requested.
        break_even: The smallest shape from which on each ratio pays (`benchmark.speed_table.break_even`).
        quality: Known quality of these graphs: for each task and data set the metric, and each variant's
            value and loss.
    """

    shapes: Sequence[ShapeResult]
    break_even: Sequence[Mapping[str, Any]]
    quality: Sequence[Mapping[str, Any]]

    def results(self) -> Iterator[tuple[str, bool, Sequence[Mapping[str, Any]]]]:
        """Yield each shape's name, whether it settled, and its rows."""
        for shape in self.shapes:
            yield f"{shape.batch_size}x{shape.sequence_length}", shape.settled, shape.rows


def bench(
    bundle: str | Path,
    shapes: Sequence[Shape],
    variants: Sequence[int | str] | None = None,
    *,
    runtimes: Sequence[str] | None = None,
    backbone: str | None = None,
    settings: TimingSettings | None = None,
    profile: bool = False,
    allow_unverified: bool = False,
    lean_runtime: Path | None = None,
    progress: Progress | None = None,
) -> Benchmark:
    """Time a bundle.

    Args:
        bundle: The bundle's folder.
        shapes: Shapes (batch_size, sequence_length). All rows are full.
        variants: Ratios or names. None means all. Ratio 1 is always included.
        runtimes: Names in `benchmark.runtimes.RUNTIMES`. None means all that are installed and run on the
            CPU; optional ones among these are left out if they fail.
        backbone: The backbone's location, for PyTorch. None means its location when the bundle was built.
        settings: Settings of the timing.
        profile: Also measure where each graph spends its time on ONNX Runtime. Requires the extra `export`.
        allow_unverified: Time engines that have not been verified on a GPU of this kind.
        lean_runtime: Library of the lean runtime of the TensorRT that built the engines, if the installed one
            is later.
        progress: Receives progress reports and notes.

    Raises:
        UserError: The bundle is damaged, a shape exceeds the model's limit, or a runtime cannot run here.
    """
    progress = progress or Progress()
    settings = settings or TimingSettings()
    opened = Bundle.load(bundle)
    if opened.manifest.backbone.generates:
        raise UserError(
            f"{opened.path} generates text, whose requests have another shape.",
            "Call bench_text.",
        )
    if profile or runtimes is None or any(RUNTIMES[name].needs == "onnxruntime" for name in runtimes):
        require_onnxruntime()
    if profile:
        require("onnx_ir", "export", "Reading the modules of a graph")
    entry = opened.manifest.backbone
    for batch_size, length in shapes:
        if entry.max_length is not None and length > entry.max_length:
            raise UserError(
                f"The shape {batch_size}x{length} is over the model's limit of {entry.max_length} tokens.",
                f"--shape {batch_size}x{entry.max_length}",
            )
    chosen = chosen_variants(opened, variants)
    before, precision = conditions(), find_precision(opened.manifest.precision)

    def load_backbone() -> "Backbone":
        without = "choose only runtimes without PyTorch, for example --runtime onnxruntime"
        return load_bundle_backbone(opened, backbone, without, precision.dtype)

    names = list(runtimes or available_runtimes())
    if precision.is_half and not all(RUNTIMES[name].gpu for name in names):
        progress.note(f"A CPU's speed in {precision.name} says nothing about a GPU's.")
    with (
        open_subjects(
            opened,
            load_backbone,
            SessionOptions(settings.threads, allow_unverified, lean_runtime),
        ) as opener,
        torch_threads(settings.threads, len(shapes) if {*names} & {*COMPILED_RUNTIMES} else 0) as threads,
    ):
        subjects = open_all(opener, names, chosen, progress, named=runtimes is not None)
        inputs = {shape: _inputs(opened, shape) for shape in shapes}
        run_once(subjects, inputs, progress, named=runtimes is not None)
        timed = time_everything(opener, subjects, inputs, settings, progress)
        results = [_result(opener, subjects, shape, timed[shape], progress) for shape in inputs]
        if profile:
            results = [_profile(opened, chosen, result, settings, progress) for result in results]
    by_shape = [((r.batch_size, r.sequence_length), r.rows) for r in results]
    graphs = opened.graph_hashes()
    return Benchmark(
        bundle=opened.path,
        shapes=results,
        break_even=break_even(by_shape),
        quality=quality_of_graphs(opened.path, opened.variant_hashes(), opened.manifest.baseline.name),
        graphs=graphs,
        settings=settings,
        torch_threads=threads,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        conditions={"before": before, "after": conditions()},
        versions=versions("variator-export", *_LIBRARIES, *distributions()),
    )


def chosen_variants(bundle: Bundle, asked: Sequence[int | str] | None) -> list[Variant]:
    """The variants to time, each once: those asked for, or all; the baseline first in any case."""
    found = [bundle.variant(v) for v in asked] if asked else list(bundle.manifest.variants)
    found = [bundle.manifest.baseline, *(v for v in found if not v.baseline)]
    return list({variant.name: variant for variant in found}.values())


def _result(
    opener: Subjects, subjects: Sequence[Subject], shape: Shape, timed: Timed, progress: Progress
) -> ShapeResult:
    macs = {s.key: opener.macs(s, *shape) for s in subjects}
    rows = speed_rows(subjects, timed.timings, macs, shape[0] * shape[1])
    slowest = max(rows, key=lambda row: row["median_ms"])
    progress.note(
        f"{shape[0]}x{shape[1]}: {sum(timed.settled)} of {len(timed.settled)} openings settled; the slowest "
        f"is {slowest['variant']} on {slowest['runtime']} with {slowest['median_ms']:.1f} ms"
    )
    return ShapeResult(*shape, all(timed.settled), sum(timed.settled), rows, {})


def _inputs(bundle: Bundle, shape: Shape) -> Arrays:
    config = bundle.config()
    return speed_inputs(bundle.manifest.backbone.inputs, int(config["vocab_size"]), *shape)


def _profile(
    bundle: Bundle,
    variants: Sequence[Variant],
    result: ShapeResult,
    settings: TimingSettings,
    progress: Progress,
) -> ShapeResult:
    from variator_export.engines.onnxruntime.graph import profile_operators
    from variator_export.graph.modules import module_names

    inputs = _inputs(bundle, (result.batch_size, result.sequence_length))
    profiles = {}
    with progress.bar(f"profile {result.batch_size}x{result.sequence_length}", len(variants)) as advance:
        for variant in variants:
            graph = bundle.graph(variant.graph)
            times = profile_operators(graph, inputs, threads=settings.threads)
            profiles[variant.name] = profile_rows(times, module_names(graph))
            advance()
    return replace(result, profiles=profiles)


@contextmanager
def torch_threads(threads: int | None, num_compiled_shapes: int) -> Iterator[int | None]:
    """Set PyTorch's number of threads within the block, and yield it. Yield None without PyTorch.

    The recompile limit of torch.compile is raised too. After eight shapes, its default, torch.compile gives
    up and runs eager PyTorch under its own name.
    """
    if not is_importable("torch"):
        yield None
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        if num_compiled_shapes:
            import torch._dynamo

            limit = max(torch._dynamo.config.recompile_limit, num_compiled_shapes + 1)
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=limit))
        yield torch.get_num_threads()
