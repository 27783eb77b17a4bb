"""Quality of every ratio against the uncompressed backbone, in eager PyTorch and through exported graphs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from variator_export.bundle.manifest import Variant
from variator_export.bundle.reports import QUALITY_REPORT, store_report
from variator_export.core.environment import require, require_export
from variator_export.core.errors import NumbersDisagreeError, UserError
from variator_export.core.hashing import sha256_json
from variator_export.core.json_file import read_json_object
from variator_export.core.precision import find_precision
from variator_export.core.progress import Progress
from variator_export.data.examples import Examples
from variator_export.engines.base import Runner
from variator_export.engines.batches import run_rows
from variator_export.engines.target import GeneratingSession
from variator_export.generation.settings import GenerationSettings, read_settings
from variator_export.quality.generating import deterministic, eager_runner, session_runner
from variator_export.quality.metrics import Metrics, relative_loss
from variator_export.quality.samples import Interval, interval, loss_interval
from variator_export.quality.tasks import choose_task
from variator_export.quality.tasks.base import Encode, EvaluatedModel, Kept, Measurement
from variator_export.quality.tasks.generated_text import TEXT_TO_TEXT
from variator_export.sessions import Bundle
from variator_export.text.tokenizer import TextEncoder
from variator_export.verification.eager_bundle import load_bundle_backbone
from variator_export.verification.judging.compare import deviation

EvaluationRuntime = Literal["eager", "onnxruntime"]


@dataclass(frozen=True)
class QualityRow:
    """Quality of one variant on one runtime.

    Attributes:
        variant: The variant's name.
        ratio: The ratio k.
        runtime: The runtime's name.
        metrics: Metrics by name (`quality.metrics`). None where one is undefined.
        relative_loss: The share of the main metric that is lost against ratio 1 on the same runtime; for a
            quantised bundle, against ratio 1 in float32 if eager PyTorch ran. None if it is undefined.
        interval: The 95 % interval of the main metric, from resampling the examples. None if it is undefined.
        loss_interval: The 95 % interval of the relative loss, with the same examples at both ratios.
    """

    variant: str
    ratio: int
    runtime: EvaluationRuntime
    metrics: Mapping[str, float | None]
    relative_loss: float | None
    interval: Interval | None
    loss_interval: Interval | None


@dataclass(frozen=True)
class Quality:
    """Result of `evaluate`.

    Attributes:
        task: The task that was evaluated.
        metric: The task's main metric, in which losses are counted.
        data: Name, sha256, columns and number of the examples, and the limit on tokens.
        rows: Rows by runtime and ratio, ratio 1 first.
        agreement: The deviation of the exported graph's outputs from those of eager PyTorch, by variant.
            Empty unless both ran.
        graphs: The hash of each variant (`BundleFiles.variant_hashes`).
        warnings: Reasons to doubt the result.
        exact: Whether the exported graphs should agree with eager PyTorch except for rounding. False for a
            quantised bundle, whose eager model is the float32 one.
    """

    task: str
    metric: str
    data: Mapping[str, Any]
    rows: tuple[QualityRow, ...]
    agreement: Mapping[str, Mapping[str, Any]]
    graphs: Mapping[str, str]
    warnings: tuple[str, ...]
    exact: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        return asdict(self)


def evaluate_bundle(
    bundle: Bundle,
    request: "Request",
    *,
    backbone: str | None = None,
    runtimes: Sequence[EvaluationRuntime] = ("eager", "onnxruntime"),
    progress: Progress | None = None,
) -> Quality:
    """Measure the quality of every variant of a bundle.

    Args:
        bundle: The bundle.
        request: What is to be measured.
        backbone: The backbone's source, for eager PyTorch. None means the source that the bundle names.
        runtimes: Runtimes to run. With both, their outputs must agree except for rounding. The eager model of
            a quantised bundle is the float32 one, so there the outputs need not agree.
        progress: Receives progress reports.

    Raises:
        UserError: The data does not fit the task, or a package is not installed.
        NumbersDisagreeError: The exported graph does not compute what eager PyTorch computes.
    """
    for module in ("scipy", "sklearn"):
        require(module, "evaluate", "Evaluating quality")
    if "eager" in runtimes:
        require_export()
    entry, examples = bundle.manifest.backbone, request.examples
    model = EvaluatedModel(entry.source, entry.task, entry.outputs, entry.token_outputs, bundle.config())
    name, measurement, settings = request.prepare(model, bundle.text_encoder(), bundle.path)
    evaluation = _Evaluation(bundle, measurement, tuple(runtimes), settings, progress or Progress())
    evaluation.run(backbone)
    data = {
        "name": examples.name,
        "sha256": examples.sha256,
        "columns": asdict(examples.columns),
        "examples": len(examples),
        "max_tokens": request.max_tokens,
        "prompt_name": request.prompt_name,
        "truncated": sum(row.truncated for row in measurement.rows),
    }
    if settings is not None:
        data["generation"] = settings.model_dump(mode="json", include={"max_new_tokens", *request.generation})
    return Quality(
        name,
        measurement.metric,
        data,
        tuple(sorted(evaluation.rows, key=lambda row: runtimes.index(row.runtime))),
        evaluation.agreement,
        bundle.variant_hashes(),
        tuple(dict.fromkeys(evaluation.warnings)),
        exact=not find_precision(bundle.manifest.precision).quantizes,
    )


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        task: The task (docs/evaluation.md). None means the first task that the model and the examples allow.
        examples: Texts, with the pairs and targets that the task needs.
        max_tokens: Maximum length of a text. Longer texts are truncated. None means the model's limit.
        prompt_name: The model's prompt to put before each text. None means the model's default prompt.
        generation: Changes of the model's own settings of generation (`GenerationSettings`).
    """

    task: str | None
    examples: Examples
    max_tokens: int | None = None
    prompt_name: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)

    def prepare(
        self, model: EvaluatedModel, encoder: TextEncoder, folder: Path
    ) -> tuple[str, Measurement, GenerationSettings | None]:
        """Prepare the evaluation.

        Args:
            model: The model.
            encoder: The model's tokenizer.
            folder: The folder with the model's own settings of generation.

        Returns:
            The task's name, its measurement, and the settings of generation; None if it generates nothing.

        Raises:
            UserError: The model or the examples do not fit the task; or a setting does not exist, contradicts
                another one, or asks for draws.
        """
        task = choose_task(self.task, model, self.examples)
        if self.generation and task.name != TEXT_TO_TEXT.name:
            raise UserError(
                f"The task {task.name} generates no text, so {', '.join(self.generation)} would not be used.",
                "Leave out the settings of generation.",
            )
        limits = [limit for limit in (self.max_tokens, encoder.max_length) if limit is not None]
        encode = Encode(encoder, min(limits, default=None), self.prompt_name, model.task)
        measurement = task.measurement(model, self.examples, encode)
        generates = measurement.generates
        settings = deterministic(read_settings(folder), self.generation) if generates else None
        return task.name, measurement, settings


class _Evaluation:
    """A measurement of a bundle's variants, one after the other because outputs and sessions hold memory.

    Attributes:
        rows: The result of each variant on each runtime, in the order in which they ran.
        agreement: The deviation between the runtimes, by variant.
        warnings: Reasons to doubt the result.
    """

    def __init__(
        self,
        bundle: Bundle,
        measurement: Measurement,
        runtimes: tuple[EvaluationRuntime, ...],
        settings: GenerationSettings | None,
        progress: Progress,
    ) -> None:
        self._bundle = bundle
        self._measurement = measurement
        self._runtimes = runtimes
        self._settings = settings
        self._progress = progress
        self._quantizes = find_precision(bundle.manifest.precision).quantizes
        # The uncompressed model's outputs and metrics, by runtime.
        self._plain: dict[EvaluationRuntime, tuple[Kept, Metrics]] = {}
        self.rows: list[QualityRow] = []
        self.agreement: dict[str, dict[str, Any]] = {}
        self.warnings: list[str] = []

    def run(self, backbone: str | None) -> None:
        """Run every variant on every runtime, the uncompressed one first."""
        first = self._bundle.manifest.baseline
        if self._quantizes and "eager" not in self._runtimes:
            precision = self._bundle.manifest.precision
            self.warnings.append(
                f"The losses do not count what {precision} itself costs: eager PyTorch, which runs float32, "
                "was left out."
            )
        others = [variant for variant in self._bundle.manifest.variants if variant is not first]
        variants = [first, *sorted(others, key=lambda v: (v.ratio, v.name))]
        runners = {r: _runners(self._bundle, variants, r, backbone, self._settings) for r in self._runtimes}
        for variant in variants:
            found = {runtime: self._outputs(variant, runtime, runners[runtime]) for runtime in self._runtimes}
            for runtime in sorted(found, key=lambda name: name != "eager"):  # what others are compared with
                self._measure(variant, runtime, found[runtime])
            if len(found) > 1:
                self.agreement[variant.name] = self._agree(variant.name, found)

    def _outputs(self, variant: Variant, runtime: EvaluationRuntime, runners: Iterator[Runner]) -> Kept:
        """Run all rows, and keep what the task needs."""
        entry, name = self._bundle.manifest.backbone, f"{variant.name} {runtime}"
        measurement, runner = self._measurement, next(runners)
        found: dict[int, np.ndarray] = {}
        with self._progress.bar(name, len(measurement.rows)) as advance:
            for index, outputs in run_rows(
                runner.run,
                measurement.rows,
                entry.inputs,
                pad_token_id=entry.pad_token_id,
                token_outputs=entry.token_outputs,
            ):
                # A copy, because a view would keep the whole batch in memory.
                found[index] = np.array(measurement.keep(index, outputs))
                advance()
        kept = [found[index] for index in range(len(measurement.rows))]
        if not all(np.isfinite(values).all() for values in kept):
            raise UserError(
                f"{name}: the outputs hold values that are NaN or infinite.",
                "Train or import the plugin again.",
            )
        return kept

    def _measure(self, variant: Variant, runtime: EvaluationRuntime, kept: Kept) -> None:
        base: EvaluationRuntime = "eager" if self._quantizes and "eager" in self._runtimes else runtime
        if base not in self._plain:  # the uncompressed model, which runs first
            self._plain[base] = kept, self._measurement.measure(kept, kept)
        plain, whole = self._plain[base]
        metrics = whole if kept is plain else self._measurement.measure(kept, plain)
        values = {name: samples.value for name, samples in metrics.items()}
        main = self._measurement.metric
        lost = relative_loss(values, {main: whole[main].value}, main)
        within = None if lost is None else loss_interval(metrics[main], whole[main])
        around = interval(metrics[main])
        self.rows.append(QualityRow(variant.name, variant.ratio, runtime, values, lost, around, within))
        self.warnings += [f"{variant.name} {reason}." for reason in self._measurement.warnings(kept)]

    def _agree(self, variant: str, found: Mapping[EvaluationRuntime, Kept]) -> dict[str, Any]:
        compared = [self._measurement.compared(found[runtime]) for runtime in ("onnxruntime", "eager")]
        if self._measurement.generates:
            # Where two tokens are equally good within rounding, texts may part; `verify` finds all else.
            return {"same_texts": float(np.mean(compared[0] == compared[1]))}
        result = deviation(*compared)
        allowed = find_precision(self._bundle.manifest.precision).agreement
        # Negated so that NaN is refused too.
        if not self._quantizes and not result.relative_frobenius <= allowed:
            raise NumbersDisagreeError(
                f"{variant}: the graph's outputs differ from eager PyTorch's: {result}.",
                "This is a fault of the export: please report it with the bundle's manifest.",
            )
        return result.as_dict()


def _runners(
    bundle: Bundle,
    variants: Sequence[Variant],
    runtime: EvaluationRuntime,
    backbone: str | None,
    settings: GenerationSettings | None,
) -> Iterator[Runner]:
    """Yield the runner of each variant; settings of generation for one that generates text."""
    if runtime == "onnxruntime":
        for variant in variants:
            session = bundle.session("onnxruntime", variant.name)
            if settings is None:
                yield session
            else:
                assert isinstance(session, GeneratingSession)
                yield session_runner(session, variant.name, settings)
        return
    from variator_export.engines.eager import EagerModel

    precision = find_precision(bundle.manifest.precision).unquantized
    loaded = load_bundle_backbone(bundle, backbone, "--runtime onnxruntime", precision)
    for variant in variants:
        model = EagerModel.of_variant(loaded, bundle, variant)
        yield model if settings is None else eager_runner(model, settings, bundle.path)


def store_quality(bundle: Path, quality: Quality) -> None:
    """Store a result in its bundle. The manifest's hashes do not cover reports.

    The bundle keeps one result for each task, data set and setting. Results for another backbone are removed.

    Raises:
        UserError: The bundle cannot be written, or its report is broken.
    """
    path = bundle / QUALITY_REPORT
    reports = read_json_object(path, f"Remove the broken report: rm '{path}'") if path.exists() else {}
    kept = {
        key: report for key, report in reports.items() if isinstance(report, dict) and _is_of(report, quality)
    }
    key = sha256_json([quality.task, quality.data])
    state = "The quality was measured; the quality report is not stored."
    store_report(bundle, QUALITY_REPORT, {**kept, key: quality.as_dict()}, state)


def _is_of(report: Mapping[str, Any], quality: Quality) -> bool:
    """Whether a stored result has the same uncompressed model, with which each variant is compared."""
    graphs, uncompressed = report.get("graphs"), quality.rows[0].variant
    return isinstance(graphs, Mapping) and graphs.get(uncompressed) == quality.graphs.get(uncompressed)
