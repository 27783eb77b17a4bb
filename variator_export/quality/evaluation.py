"""Quality of every ratio against the uncompressed backbone, in eager PyTorch and through exported graphs."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from variator_export.building.plan import BASELINE
from variator_export.building.recipe_build import build
from variator_export.bundle.manifest import is_bundle
from variator_export.bundle.quality_report import MAIN_METRIC, Task
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
from variator_export.model.plugin_file import load_plugin_config
from variator_export.model.plugin_layout import CONFIG_NAME
from variator_export.model.source import PACKAGE_PREFIX, resolve_source
from variator_export.quality.metrics import (
    classification_metrics,
    embedding_metrics,
    relative_loss,
    similarity_metrics,
)
from variator_export.recipe.recipe import BackboneRecipe, PluginRecipe, Recipe
from variator_export.sessions import Bundle
from variator_export.text.tokenizer import TokenRow
from variator_export.verification.compare import deviation
from variator_export.verification.eager_bundle import load_bundle_backbone

EvaluationRuntime = Literal["eager", "onnxruntime"]
# Output arrays by variant and runtime.
Outputs = dict[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class QualityRow:
    """Quality of one variant on one runtime.

    Attributes:
        variant: The variant's name.
        ratio: The ratio k.
        runtime: The runtime's name.
        metrics: Metrics by name (`quality.metrics`).
        relative_loss: The share of the task's main metric that is lost against ratio 1 on the same runtime.
            None if it is undefined.
    """

    variant: str
    ratio: int
    runtime: EvaluationRuntime
    metrics: Mapping[str, float | None]
    relative_loss: float | None


@dataclass(frozen=True)
class Quality:
    """Result of `evaluate`.

    Attributes:
        task: The task that was evaluated.
        data: Name, sha256, columns and number of the examples, and the limit on tokens.
        rows: Rows by runtime and ratio, ratio 1 first.
        agreement: The deviation of the exported graph's outputs from those of eager PyTorch, by variant.
            Empty unless both ran.
        graphs: The sha256 of each variant's graph.
    """

    task: Task
    data: Mapping[str, Any]
    rows: tuple[QualityRow, ...]
    agreement: Mapping[str, Mapping[str, Any]]
    graphs: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        return asdict(self)


def evaluate(
    paths: str | Path | Sequence[str | Path],
    examples: Examples,
    *,
    task: Task | None = None,
    backbone: str | None = None,
    architecture: str | None = None,
    runtimes: Sequence[EvaluationRuntime] = ("eager", "onnxruntime"),
    max_tokens: int | None = None,
    prompt_name: str | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Measure the quality of every variant.

    Args:
        paths: One bundle, or plugin folders of one backbone. Plugin folders are exported first.
        examples: Texts, with the pairs and targets that the task needs.
        task: The task. None means classification if the model has logits, else similarity if the examples
            have pairs and scores, else embedding.
        backbone: The backbone's source. None means the source that the bundle or the plugins name.
        architecture: The class of transformers to load, for plugin folders. None means the class that
            config.json names.
        runtimes: Runtimes to run. With both, their outputs must agree except for rounding.
        max_tokens: Maximum length of a text. Longer texts are truncated. None means the model's limit.
        prompt_name: The model's prompt to put before each text. None means the model's default prompt.
        progress: Receives progress reports.

    Raises:
        UserError: A path is neither a bundle nor a plugin folder, or the data does not fit the task.
        NumbersDisagreeError: The exported graph does not compute what eager PyTorch computes.
    """
    folders = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    for module in ("scipy", "sklearn"):
        require(module, "evaluate", "Evaluating quality")
    if "eager" in runtimes:
        require_export()
    elif backbone is not None and is_bundle(folders[0]):
        raise UserError(
            "A bundle's graphs contain their backbone, so --backbone would not be used.", "Leave it out."
        )
    progress = progress or Progress()
    with _bundle(folders, task, examples, (backbone, architecture), progress) as bundle:
        entry = bundle.manifest.backbone
        chosen, output = _task_and_output(task, entry.outputs, entry.token_outputs, examples, entry.source)
        labels = _labels(bundle, examples) if chosen == "classification" else []
        scores = examples.scores() if chosen == "similarity" else []
        rows = _encode(bundle, examples, max_tokens, prompt_name)
        found: Outputs = {
            (name, runtime): _run(runner, output, rows, bundle, progress, f"{name} {runtime}")
            for runtime in runtimes
            for name, runner in _runners(bundle, runtime, backbone)
        }
        agreement = {
            variant.name: _agree(variant.name, output, found, bundle.manifest.precision)
            for variant in bundle.manifest.variants
            if len(runtimes) > 1
        }
        result_rows = _rows(bundle, chosen, runtimes, found, examples, labels, scores)
        data = {
            "name": examples.name,
            "sha256": examples.sha256,
            "columns": asdict(examples.columns),
            "examples": len(examples),
            "max_tokens": max_tokens,
            "prompt_name": prompt_name,
            "truncated": sum(row.truncated for row in rows),
        }
        graphs = bundle.graph_hashes()
        return Quality(chosen, data, tuple(result_rows), agreement, graphs)


@contextmanager
def _bundle(
    paths: Sequence[Path],
    task: Task | None,
    examples: Examples,
    backbone: tuple[str | None, str | None],
    progress: Progress,
) -> Iterator[Bundle]:
    if len(paths) == 1 and is_bundle(paths[0]):
        yield Bundle.load(paths[0])
        return
    for path in paths:
        if is_bundle(path):
            raise UserError(
                f"{path} is a bundle, and only one bundle can be evaluated at a time.", "Pass it alone."
            )
        if not (path / CONFIG_NAME).is_file():
            raise UserError(
                f"{path} is neither a bundle nor a plugin folder.",
                "Pass one bundle (from `build`), or plugin folders (from `train` or `import`).",
            )
    source, architecture = backbone[0] or _backbone_of(paths), backbone[1]
    _check_backbone(source, architecture, task, examples)
    plugins = tuple(PluginRecipe(source=str(path)) for path in paths)
    ratios = [load_plugin_config(path).ratio for path in paths]
    if len(set(ratios)) < len(ratios):
        plugins = tuple(
            PluginRecipe(source=str(path), name=f"{index + 1}-{path.resolve().name}")
            for index, path in enumerate(paths)
        )
    recipe = Recipe(
        name="evaluated",
        backbone=BackboneRecipe(source=source, architecture=architecture),
        plugins=plugins,
        speed=None,
        ratios=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        yield Bundle.load(build(recipe, Path(folder) / "bundle", progress=progress).bundle)


def _backbone_of(paths: Sequence[Path]) -> str:
    names = {config.backbone.name if config.backbone else None for config in map(load_plugin_config, paths)}
    name = next(iter(names))
    if len(names) > 1 or name is None or not name.startswith(PACKAGE_PREFIX):
        raise UserError(
            f"The plugins name {', '.join(sorted(str(n) for n in names))} as their backbone, but not where "
            "it is.",
            "Pass its location: --backbone SRC",
        )
    return name


def _check_backbone(source: str, architecture: str | None, task: Task | None, examples: Examples) -> None:
    """Refuse a backbone before the export if the task could not be measured after it."""
    require_export()
    from variator_export.model.backbone import read_backbone_info

    info = read_backbone_info(resolve_source(source), architecture)
    _task_and_output(task, info.outputs, info.spec.token_outputs, examples, source)


def _task_and_output(
    task: Task | None, outputs: Sequence[str], token_outputs: Sequence[str], examples: Examples, source: str
) -> tuple[Task, str]:
    """Return the task and the output that it evaluates."""
    # Outputs with one row per token do not describe a text as a whole.
    of_texts = [name for name in outputs if name not in token_outputs]
    chosen = task or _task(of_texts, examples)
    return chosen, _check(chosen, of_texts, examples, source)


def _task(outputs: Sequence[str], examples: Examples) -> Task:
    if "logits" in outputs:
        return "classification"
    return "similarity" if examples.pairs is not None and examples.targets is not None else "embedding"


def _check(task: Task, outputs: Sequence[str], examples: Examples, source: str) -> str:
    """Check that the model and the examples fit a task, and return the output that it evaluates."""
    output = "logits" if task == "classification" else "sentence_embedding"
    if output not in outputs:
        raise UserError(
            f"The task {task} needs the output {output} for each text; {source} returns "
            f"{', '.join(outputs) or 'only outputs for each token'}.",
            "Choose another --task"
            + ("." if output == "logits" else ", or add the sentence-transformers files to the folder."),
        )
    if task != "embedding" and examples.targets is None:
        raise UserError(f"The task {task} needs labels or scores.", "Name their column: --label-column NAME")
    if task == "similarity" and examples.pairs is None:
        raise UserError(
            "The task similarity needs pairs of texts.", "Name the second column: --pair-column NAME"
        )
    return output


def _encode(bundle: Bundle, examples: Examples, max_tokens: int | None, prompt: str | None) -> list[TokenRow]:
    """Encode all texts as token rows.

    For embeddings, the second texts of the pairs follow the first ones as rows of their own.
    """
    encoder = bundle.text_encoder()
    limits = [limit for limit in (max_tokens, encoder.max_length) if limit is not None]
    limit = min(limits, default=None)
    if examples.pairs is None or "logits" in bundle.manifest.backbone.outputs:
        return encoder.token_rows(examples.texts, limit, pairs=examples.pairs, prompt_name=prompt)
    return encoder.token_rows([*examples.texts, *examples.pairs], limit, prompt_name=prompt)


def _runners(
    bundle: Bundle, runtime: EvaluationRuntime, backbone: str | None
) -> Iterator[tuple[str, Runner]]:
    """Yield the runner of each variant, one after the other because a session holds memory."""
    variants = sorted(bundle.manifest.variants, key=lambda v: (v.ratio, v.name))
    if runtime == "onnxruntime":
        for variant in variants:
            yield variant.name, bundle.session("onnxruntime", variant.name)
        return
    from variator_export.engines.eager import EagerModel

    loaded = load_bundle_backbone(bundle, backbone, "--runtime onnxruntime")
    for variant in variants:
        yield variant.name, EagerModel.of_variant(loaded, bundle, variant)


def _run(
    runner: Runner, output: str, rows: Sequence[TokenRow], bundle: Bundle, progress: Progress, name: str
) -> np.ndarray:
    """Run all rows and return one output, (number of rows, size)."""
    entry, found = bundle.manifest.backbone, {}
    with progress.bar(name, len(rows)) as advance:
        for index, values in run_rows(runner.run, rows, entry.inputs, pad_token_id=entry.pad_token_id):
            found[index] = values[output]
            advance()
    stacked = np.stack([found[index] for index in range(len(rows))])
    if not np.isfinite(stacked).all():
        raise UserError(
            f"{name}: {output} holds values that are NaN or infinite.", "Train or import the plugin again."
        )
    return stacked


def _agree(variant: str, output: str, found: Outputs, precision: str) -> dict[str, Any]:
    result = deviation(found[variant, "onnxruntime"], found[variant, "eager"])
    # Negated so that NaN is refused too.
    if not result.relative_frobenius <= find_precision(precision).agreement:
        raise NumbersDisagreeError(
            f"{variant}: the graph's {output} differs from eager PyTorch's: {result}.",
            "This is a fault of the export: please report it with the bundle's manifest.",
        )
    return result.as_dict()


def _labels(bundle: Bundle, examples: Examples) -> list[int]:
    config = bundle.config()
    return examples.class_indices(config.get("label2id") or {})


def _rows(
    bundle: Bundle,
    task: Task,
    runtimes: Sequence[EvaluationRuntime],
    found: Outputs,
    examples: Examples,
    labels: Sequence[int],
    scores: Sequence[float],
) -> Iterator[QualityRow]:
    variants = sorted(bundle.manifest.variants, key=lambda v: (v.ratio, v.name))
    count = len(examples)
    # Duplicates are removed: a copy of a text would always stay among the text's nearest neighbours.
    distinct = _distinct((*examples.texts, *(examples.pairs or ())))
    for runtime in runtimes:
        plain = found[BASELINE, runtime]
        whole: Mapping[str, Any] | None = None
        for variant in variants:
            values = found[variant.name, runtime]
            metrics: dict[str, float | None]
            if task == "classification":
                metrics = dict(classification_metrics(values, plain, labels))
            else:
                metrics = embedding_metrics(values[distinct], plain[distinct])
                if task == "similarity":
                    metrics = {**similarity_metrics(values[:count], values[count:], scores), **metrics}
            whole = whole or metrics
            lost = relative_loss(metrics, whole, MAIN_METRIC[task])
            yield QualityRow(variant.name, variant.ratio, runtime, metrics, lost)


def _distinct(texts: Sequence[str]) -> list[int]:
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        first.setdefault(text, index)
    return list(first.values())


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
    graphs = report.get("graphs")
    return isinstance(graphs, Mapping) and graphs.get(BASELINE) == quality.graphs.get(BASELINE)
