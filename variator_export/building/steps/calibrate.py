"""The calibration of a static quantisation, on texts of the recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from variator_export.building.context import BuildContext
from variator_export.bundle.manifest import CALIBRATION
from variator_export.core.errors import UserError
from variator_export.core.precision import find_precision
from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns, Examples
from variator_export.data.hub_dataset import is_dataset
from variator_export.recipe.recipe import CalibrationRecipe

_STEP = "calibrate"
_MADE_BY = ("model", "text", "data", "core/precision.py")
# A scale found on fewer texts is too small for many others.
_FEWEST_TEXTS = 32
# More saturated tokens than this among the verification texts, and the calibration texts are of another kind.
_MOST_SATURATED = 0.05


def calibrate_backbone(context: BuildContext) -> None:
    """Find the scales of the recipe's precision, if it needs any.

    Raises:
        UserError: The recipe names no texts, or they cannot be read or are too few.
    """
    recipe, staged = context.recipe.quantization.calibration, context.staged
    precision = find_precision(context.recipe.precision)
    if not precision.needs_calibration:
        return
    if recipe is None:
        raise UserError(
            f"{precision.name} has constant scales of activations, which are found on texts, and the recipe "
            "names none.",
            f"Give {_FEWEST_TEXTS} texts or more of the kind that the model will read: --calibration FILE "
            "--calibration-column NAME, or quantization.calibration in the recipe.",
        )
    examples = None if _is_kept(context, recipe) else _read(recipe)

    def make() -> None:
        from variator_export.model.quantization.calibration import calibrate
        from variator_export.model.weights_file import write_weights

        assert examples is not None
        rows = _encode(context, recipe, examples)
        backbone = context.unquantized
        layers = backbone.linear_layers
        with staged.progress.bar(_STEP, len(rows) + len(layers)) as advance:
            found = calibrate(backbone.spec.encoder(backbone.model), layers, rows, precision, advance)
        write_weights(found.tensors(), staged.folder / CALIBRATION)
        _warn_of_saturation(context)

    if examples is None:
        assert staged.old is not None
        depends_on: Mapping[str, Any] = staged.old.manifest.steps[_STEP]
    else:
        depends_on = {
            "backbone": context.backbone_key,
            "precision": precision.name,
            "data": examples.sha256,
            "calibration": recipe.model_dump(mode="json", exclude={"data"}),
            "made_by": context.code_fingerprint(*_MADE_BY),
        }
    staged.step(_STEP, depends_on, [CALIBRATION], make)


def _is_kept(context: BuildContext, recipe: CalibrationRecipe) -> bool:
    """Whether the bundle has this calibration, and its texts are not to be read again.

    They are not if the recipe names none, if the file is gone, or for a data set of the same name.
    """
    old = context.staged.old
    if old is None:
        return False
    if not (context.keeps_calibration or is_dataset(recipe.data) or not Path(recipe.data).exists()):
        return False
    before = (old.manifest.recipe.get("quantization") or {}).get("calibration")
    same = before == recipe.model_dump(mode="json") and CALIBRATION in old.manifest.files
    return same and old.manifest.steps.get(_STEP, {}).get("precision") == context.recipe.precision


def _read(recipe: CalibrationRecipe) -> Examples:
    examples = read_examples(recipe.data, Columns(recipe.text_column, recipe.pair_column, None))
    if len(examples.texts) < _FEWEST_TEXTS:
        raise UserError(
            f"{examples.name} has {len(examples.texts)} texts; a calibration needs {_FEWEST_TEXTS} or more.",
            "Give more texts, of the kind that the model will read.",
        )
    return examples


def _encode(
    context: BuildContext, recipe: CalibrationRecipe, examples: Examples
) -> list[dict[str, np.ndarray]]:
    """Encode the chosen texts one by one: padding would count as text."""
    number = min(recipe.texts, len(examples.texts))
    # Evenly spaced, because many files are sorted by label.
    chosen = [int(i) for i in np.linspace(0, len(examples.texts) - 1, number).round()]
    limits = [limit for limit in (recipe.max_tokens, context.info.max_length) if limit is not None]
    return [
        context.encoder.encode(
            [examples.texts[i]],
            context.info.spec.family.inputs,
            min(limits, default=None),
            pairs=None if examples.pairs is None else [examples.pairs[i]],
        )
        for i in chosen
    ]


def _warn_of_saturation(context: BuildContext) -> None:
    """Note that the verification texts have activations that the calibration texts do not cover."""
    from variator_export.model.quantization.calibration import saturated_share
    from variator_export.verification.cases import DEFAULT_TEXTS

    backbone, calibration = context.unquantized, context.calibration
    assert calibration is not None
    texts = context.recipe.verify.texts or DEFAULT_TEXTS
    inputs, limit = context.info.spec.family.inputs, context.info.max_length
    rows = [context.encoder.encode([text], inputs, limit) for text in texts]
    precision = find_precision(context.recipe.precision)
    layer, share = saturated_share(
        backbone.spec.encoder(backbone.model), backbone.linear_layers, rows, calibration, precision
    )
    if share > _MOST_SATURATED:
        context.staged.progress.note(
            f"calibration: {share:.0%} of the tokens of verify.texts are beyond the range of the calibration "
            f"texts, in {layer}. Add texts of their kind and language."
        )
