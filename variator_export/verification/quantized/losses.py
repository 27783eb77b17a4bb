"""Loss of quality by quantisation: a quantised graph compared with the float32 model at the same ratio.

A quantised graph is not the float32 model with rounding. Whether the graph computes its quantisation
correctly is the question of the other checks, which compare it with a quantised model in eager PyTorch. This
check asks how much the quantisation itself changes, and compares the change with the recipe's limits.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from variator_export.core.errors import NumbersDisagreeError
from variator_export.engines.base import Arrays
from variator_export.recipe.recipe import QuantizationRecipe
from variator_export.verification.cases import Case
from variator_export.verification.judging.compare import argmax_agreement

# Function of names of modules that stay in float32. Returns the outputs of the quantised model; for None,
# those of the model before its quantisation.
RunWithKept = Callable[[Sequence[str] | None], Arrays]


@dataclass(frozen=True)
class QuantizationLoss:
    """How far one output of a quantised variant is from the float32 model at the same ratio.

    Attributes:
        variant: The variant's name.
        output: The output's name.
        count: The number of vectors that were compared: tokens, or rows.
        cosine: Mean cosine of the vectors.
        least_cosine: The smallest cosine.
        agreement: For classes, the share of vectors with the same largest value. None for other outputs.
        limit: The smallest mean cosine that the recipe allows, or for classes the smallest agreement.
    """

    variant: str
    output: str
    count: int
    cosine: float
    least_cosine: float
    agreement: float | None
    limit: float

    @property
    def measured(self) -> float:
        """The value that the limit applies to."""
        return self.cosine if self.agreement is None else self.agreement

    @property
    def passed(self) -> bool:
        """Whether the loss is within the limit; false for NaN."""
        return self.measured >= self.limit

    def as_dict(self) -> dict[str, Any]:
        """Return the loss as JSON data."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        kind = "mean cosine" if self.agreement is None else "agreement of the largest value"
        return (
            f"{self.variant}, {self.output}: against float32 at the same ratio the {kind} is "
            f"{self.measured:.4f}; at least {self.limit:g} is required"
        )


def quantization_losses(
    variant: str,
    found: Arrays,
    float32: Arrays,
    case: Case,
    token_outputs: Sequence[str],
    limits: QuantizationRecipe,
) -> list[QuantizationLoss]:
    """Compare the outputs of a quantised variant with those of the float32 model.

    Args:
        variant: The variant's name.
        found: Outputs of the quantised variant: (B, S, width) for tokens, (B, width) for rows, or (B, S) for
            one value per token.
        float32: Outputs of the float32 model at the same ratio.
        case: The inputs of both. Only tokens that the attention mask keeps are compared.
        token_outputs: Names of the outputs with one row per token.
        limits: The recipe's limits.
    """
    kept = case.inputs["attention_mask"] > 0
    losses = []
    for name, wanted in float32.items():
        pair = [np.asarray(values, np.float64) for values in (found[name], wanted)]
        classes = "logits" in name and wanted.shape[-1] > 1
        if name in token_outputs and wanted.ndim == 3:
            vectors = [values[kept] for values in pair]
        elif name in token_outputs:  # one value per token: a row's values are compared at its tokens
            vectors = [np.where(kept, values, values.min()) for values in pair]
        elif wanted.shape[-1] == 1:  # one score per row: the scores of all rows are one vector
            vectors = [values.reshape(1, -1) for values in pair]
        else:
            vectors = pair
        cosines = _cosines(*vectors)
        agreement = argmax_agreement(*vectors) if classes else None
        losses.append(
            QuantizationLoss(
                variant=variant,
                output=name,
                count=len(cosines),
                cosine=float(cosines.mean()),
                least_cosine=float(cosines.min()),
                agreement=agreement,
                limit=limits.min_agreement if classes else limits.min_cosine,
            )
        )
    return losses


def refuse_losses(losses: Sequence[QuantizationLoss], run: RunWithKept, candidates: Sequence[str]) -> None:
    """End a build whose quantisation loses more than the recipe allows.

    Args:
        losses: The losses of one variant.
        run: Runs the variant with some more modules in float32, on the inputs of the losses.
        candidates: The modules to try in float32, one at a time; none to try nothing.

    Raises:
        NumbersDisagreeError: A loss is outside its limit. The hint names the module that loses most.
    """
    failed = [loss for loss in losses if not loss.passed]
    if not failed:
        return
    worst = min(failed, key=lambda loss: loss.measured - loss.limit)
    problem = f"{worst}. {len(failed)} of {len(losses)} outputs are below their limit; nothing was published."
    if not candidates:
        raise NumbersDisagreeError(
            problem,
            "Leave more modules in float32 (quantization.float32_modules), or choose another precision.",
        )
    wanted = run(None)[worst.output]
    now = _distance(run([])[worst.output], wanted)
    left = {name: _distance(run([name])[worst.output], wanted) for name in candidates}
    best = min(left, key=lambda name: left[name])
    raise NumbersDisagreeError(
        problem,
        f"The module {best} loses most: with it in float32 the error is {1 - left[best] / now:.0%} smaller. "
        f"Leave it in float32 (quantization: {{float32_modules: [{best}]}}), lower the limit, or choose "
        "another precision.",
    )


def _distance(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - wanted))


def _cosines(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Cosines of the last dimension's vectors; 1 for two vectors of zeros."""
    product = (found * wanted).sum(-1)
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1)
    cosines: np.ndarray = np.where(norms == 0, 1.0, product / np.where(norms == 0, 1.0, norms)).reshape(-1)
    return cosines
