"""The quality of every ratio on the recipe's data, before a bundle is published."""

from variator_export.building.context import BuildContext
from variator_export.bundle.manifest import BACKBONE_WEIGHTS, Manifest, Variant
from variator_export.bundle.reports import QUALITY_REPORT
from variator_export.core.environment import require, require_onnxruntime, versions
from variator_export.core.errors import NumbersDisagreeError
from variator_export.core.precision import find_precision
from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns
from variator_export.model.methods import method_of
from variator_export.quality.evaluation import (
    EvaluationRuntime,
    Quality,
    Request,
    evaluate_bundle,
    store_quality,
)
from variator_export.quality.tasks.base import EvaluatedModel
from variator_export.sessions import Bundle

_MADE_BY = (
    "quality",
    "engines/onnxruntime",
    "engines/eager.py",
    "engines/decoder.py",
    "engines/text_session.py",
    "model/decoders/decoding.py",
    "generation",
    "text",
    "data",
)


def read_request(context: BuildContext) -> Request | None:
    """Read the recipe's data, and check that they fit the model's task; None if the recipe names none.

    Raises:
        UserError: The data cannot be read or do not fit the task, or a package is not installed.
    """
    recipe = context.recipe.quality
    if recipe is None:
        return None
    for module in ("scipy", "sklearn"):
        require(module, "evaluate", "Evaluating quality")
    columns = Columns(recipe.text_column, recipe.pair_column, recipe.label_column)
    request = Request(
        recipe.task, read_examples(recipe.data, columns), recipe.max_tokens, generation=recipe.generation
    )
    info = context.info
    model = EvaluatedModel(
        context.source.name,
        info.spec.head.task,
        info.outputs,
        info.token_outputs,
        info.config.to_dict(),
    )
    request.prepare(model, context.encoder, context.source.folder)
    return request


def check_quality(context: BuildContext, manifest: Manifest, request: Request) -> None:
    """Evaluate the staged bundle, and store the result in its reports.

    Raises:
        NumbersDisagreeError: A ratio loses more than the recipe allows. Nothing is published.
    """
    staged, recipe = context.staged, context.recipe.quality
    assert recipe is not None

    def make() -> None:
        with staged.preview(manifest) as folder:
            if staged.old is not None and (before := staged.old.path / QUALITY_REPORT).is_file():
                (folder / QUALITY_REPORT).parent.mkdir(parents=True, exist_ok=True)
                (folder / QUALITY_REPORT).write_bytes(before.read_bytes())
            found = evaluate_bundle(
                Bundle(folder),
                request,
                backbone=context.recipe.backbone.source,
                runtimes=_runtimes(manifest.precision),
                progress=staged.progress,
            )
            store_quality(folder, found)
        _refuse_loss(found, recipe.max_loss)
        staged.progress.note(_in_words(found))

    depends_on = {
        # Graphs refer to weights and plugins by the names of their files, so theirs alone say little.
        "computes": {
            name: staged.sha256(name)
            for variant in manifest.variants
            for name in (*variant.graphs.values(), *variant.plugin_files, *_modules(variant, manifest))
        },
        "weights": staged.sha256(BACKBONE_WEIGHTS),
        "files": staged.steps["backbone"]["files"],
        "data": request.examples.sha256,
        "quality": recipe.model_dump(mode="json", exclude={"data"}),
        "onnxruntime": versions(require_onnxruntime()),
        "made_by": context.code_fingerprint(*_MADE_BY),
    }
    staged.step("quality", depends_on, [], make)


def _modules(variant: Variant, manifest: Manifest) -> tuple[str, ...]:
    """The files of tensors that an assembly's graphs refer to."""
    return method_of(variant).tensor_files(variant, manifest.precision)


def _runtimes(precision: str) -> tuple[EvaluationRuntime, ...]:
    """The graphs; and eager PyTorch, where losses count against float32 or ONNX Runtime has no products."""
    kind = find_precision(precision)
    if kind.quantizes:
        return "eager", "onnxruntime"
    return ("onnxruntime",) if kind.on_a_cpu else ("eager",)


def _refuse_loss(found: Quality, most: float) -> None:
    # The graphs count, if they ran. Negated so that an undefined loss is refused too.
    runtime = found.rows[-1].runtime
    for row in found.rows:
        if row.runtime == runtime and not (row.relative_loss is not None and row.relative_loss <= most):
            lost = "an undefined share" if row.relative_loss is None else f"{row.relative_loss:.2%}"
            raise NumbersDisagreeError(
                f"{row.variant} loses {lost} of {found.metric} on {found.data['name']} "
                f"({found.data['examples']} examples); the recipe allows {most:.2%}.",
                "Train the plugin or the modules longer, leave the variant out (--ratio, --assembly), or "
                "raise quality.max_loss.",
            )


def _in_words(found: Quality) -> str:
    rows = [row for row in found.rows if row.runtime == found.rows[-1].runtime]
    each = (f"{row.variant} {row.metrics[found.metric]:.4f} (lost {row.relative_loss:.2%})" for row in rows)
    return f"{found.metric} on {found.data['name']}: {', '.join(each)}"
