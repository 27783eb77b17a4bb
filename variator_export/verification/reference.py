"""Reference for verifying graphs and engines: cases, the outputs of eager PyTorch, and their base errors.

The reference is computed with eager PyTorch, or read from the bundle on a machine that has neither torch nor
the backbone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from variator_export.core.axes import is_key_or_value
from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays, Runner
from variator_export.verification.cases import REAL_TEXT, Case
from variator_export.verification.judging.compare import deviation
from variator_export.verification.judging.error_budget import Budget, make_budgets, scaled
from variator_export.verification.judging.expected import Expected, RoundingRunner

ReferenceKind = Literal["eager", "stored"]
EAGER = "eager PyTorch, float64, CPU"
# The part of a stored case with base errors of more roundings, if they were measured.
_CAREFUL = "base_error_of_more_roundings"


def eager_reference(
    exact: Runner,
    same_precision: RoundingRunner,
    cases: Sequence[Case],
    precision: str,
    progress: Callable[[], None] = lambda: None,
    *,
    share: float | None = None,
) -> list[Expected]:
    """Run eager PyTorch on every case.

    Args:
        exact: Eager PyTorch in float64.
        same_precision: Eager PyTorch in the precision of the graphs to be verified. For a quantised model,
            eager PyTorch without the quantisation, if the precision has a share of its change.
        cases: The cases to run.
        precision: The name of that precision.
        progress: Called after each case.
        share: The share of the deviation between the two that is the base error
            (`error_budget.quantization_share`). None for all of it.

    Raises:
        UserError: Eager PyTorch returns NaN or infinite values.
    """
    outputs, deviations = [], []
    for case in cases:
        wanted, rounded = exact.run(case.inputs), same_precision.run(case.inputs)
        for found in (wanted, rounded):
            _refuse_not_finite(case, found)
        outputs.append({name: _where_finite(values, rounded[name]) for name, values in wanted.items()})
        deviations.append(
            {
                name: deviation(rounded[name][case.judged_rows], wanted[name][case.judged_rows])
                for name in wanted
            }
        )
        progress()
    budgets = [scaled(of_case, share or 1.0) for of_case in make_budgets(deviations, precision)]
    reference = [Expected(*item) for item in zip(cases, outputs, budgets, strict=True)]
    if share is not None:  # the base error is no rounding
        return reference
    return [each.measured_by(same_precision, same_precision.run) for each in reference]


def _where_finite(exact: np.ndarray, rounded: np.ndarray) -> np.ndarray:
    """The expected values, with NaN for rows of which eager PyTorch in the precision has no finite values.

    These are rows of padding alone in float16: its lowest number masks a score, and the sum of both overflows
    (T5). So nothing is expected there, and any value is right.
    """
    broken = ~np.isfinite(rounded.reshape(len(rounded), -1)).all(axis=1)
    if not broken.any():
        return exact
    expected = exact.copy()
    expected[broken] = np.nan
    return expected


def _refuse_not_finite(case: Case, outputs: Arrays) -> None:
    for name, values in outputs.items():
        if not np.isfinite(values[case.judged_rows]).all():
            raise UserError(
                f"Eager PyTorch itself returns NaN or infinite values in {name}, case {case.name}, input "
                f"shape {case.shape}: there is nothing to compare a graph with.",
                "Check the weights of the backbone and of the plugin.",
            )


def save_reference(reference: Sequence[Expected], path: Path) -> None:
    """Store the small cases, so that a machine without torch can verify.

    Without keys and values for a decoder: they are products of the last hidden states, and would be most of
    the bundle.

    The tensors are CASE/inputs/NAME, int64 (B, S); CASE/outputs/NAME, float32 (half the bytes of float64; the
    rounding is an eighth of the smallest limit); and CASE/base_error/NAME, float64 (3,), the fields of
    `Budget`. Where more roundings were measured, CASE/base_error_of_more_roundings/NAME.
    """
    tensors: dict[str, np.ndarray] = {}
    for expected in reference:
        name = expected.case.name
        if not expected.case.stored:
            continue
        tensors |= {f"{name}/inputs/{key}": array for key, array in expected.case.inputs.items()}
        tensors |= {
            f"{name}/outputs/{key}": expected.outputs[key].astype(np.float32)
            for key in stored_outputs(expected.outputs)
        }
        tensors |= {
            f"{name}/{part}/{key}": np.array(astuple(budgets[key]))
            for part, budgets in (("base_error", expected.budgets), (_CAREFUL, expected.careful))
            for key in stored_outputs(budgets)
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}))


def stored_outputs(outputs: Iterable[str]) -> list[str]:
    """The outputs that a stored reference has, of all outputs of a graph."""
    return [name for name in outputs if not is_key_or_value(name)]


def load_reference(path: Path, outputs: Sequence[str] | None = None) -> list[Expected]:
    """Read a reference that `save_reference` wrote.

    Args:
        path: The file.
        outputs: Names of the graph's outputs. None means that they are not checked.

    Raises:
        UserError: The file is not a stored reference, or lacks an output or the real text.
    """
    try:
        parts: dict[str, dict[str, Arrays]] = {}
        for key, array in load_file(path).items():
            case, part, name = key.split("/")
            parts.setdefault(case, {}).setdefault(part, {})[name] = array
        if REAL_TEXT not in parts:
            raise ValueError(f"it lacks the case {REAL_TEXT!r}")
        for case, part in parts.items():
            if outputs is not None and part["outputs"].keys() != set(stored_outputs(outputs)):
                raise ValueError(f"the case {case!r} has the outputs {', '.join(sorted(part['outputs']))}")
            floats = (*part["outputs"].items(), *part["base_error"].items(), *part.get(_CAREFUL, {}).items())
            for name, array in floats:
                if array.dtype.kind != "f":
                    raise TypeError(f"{name} of the case {case!r} has the type {array.dtype}")
        return [
            Expected(
                Case(case, part["inputs"], stored=True),
                part["outputs"],
                {name: Budget(*part["base_error"][name].tolist()) for name in part["outputs"]},
                careful={name: Budget(*array.tolist()) for name, array in part.get(_CAREFUL, {}).items()},
            )
            for case, part in parts.items()
        ]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a stored reference of this version: {error}.",
            "Build the bundle again, or verify with --reference eager.",
        ) from error
