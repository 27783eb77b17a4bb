"""All checks of one quantised variant, shared by `build` and `verify`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from variator_export.engines.eager import EagerModel
from variator_export.recipe.recipe import QuantizationRecipe
from variator_export.verification.cases import Case
from variator_export.verification.judging.judge import Finding
from variator_export.verification.quantized.given_rounding import check_given_rounding
from variator_export.verification.quantized.losses import QuantizationLoss, quantization_losses
from variator_export.verification.verified_graph import open_for_verification


@dataclass(frozen=True)
class QuantizedVariant:
    """A quantised variant: its graphs, and the same in eager PyTorch.

    Attributes:
        name: The variant's name.
        folder: The bundle's folder.
        graphs: Additional inputs of each graph, by file. The variant's own graph comes first.
        precision: The graphs' precision.
        exact: The quantised model in float64.
        rounded: The quantised model in float32.
        float32: The model before its quantisation.
        token_outputs: Names of the outputs with one row per token.
        limits: The recipe's limits.
    """

    name: str
    folder: Path
    graphs: Mapping[str, Mapping[str, np.ndarray]]
    precision: str
    exact: EagerModel
    rounded: EagerModel
    float32: EagerModel
    token_outputs: Sequence[str]
    limits: QuantizationRecipe


def check_quantization(
    subject: QuantizedVariant, cases: Sequence[Case], progress: Callable[[], None] = lambda: None
) -> tuple[list[Finding], list[QuantizationLoss]]:
    """Check a variant's graphs given their own rounding, and its own graph's loss against float32.

    Args:
        subject: The variant.
        cases: The cases. The loss is measured on the first one, which is real text.
        progress: Called after each graph.
    """
    graphs, folder, precision = subject.graphs, subject.folder, subject.precision
    findings = check_given_rounding(
        graphs, folder, precision, subject.exact, subject.rounded, cases, progress
    )
    text, own = cases[0], next(iter(graphs))
    found = open_for_verification(folder / own, graphs[own], precision).run(text.inputs)
    float32 = subject.float32.run(text.inputs)
    return findings, quantization_losses(
        subject.name, found, float32, text, subject.token_outputs, subject.limits
    )
