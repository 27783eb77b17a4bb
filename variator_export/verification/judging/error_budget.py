"""Error budget: the limit on how much a graph or an engine may differ from eager PyTorch.

The reference is eager PyTorch in float64. Eager PyTorch in the precision P of the graph differs from the
reference only by rounding. A correct graph in P differs by about as much, because it rounds too, only in
another order. So the limit is not a guess: it is a multiple of eager PyTorch's own rounding error on the same
inputs, in the same measures. A fault is not rounding and is far outside the limit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from variator_export.core.precision import find_precision
from variator_export.verification.judging.compare import Deviation

# The error of a correct MiniLM graph is at most 2.0 times the base error, over ratios 1, 2, 4, 8 and all
# cases.
MULTIPLE = 4.0
# Two correct computations of a quantised model differ by much more than rounding, because an activation near
# the middle between two integers falls to either side. They differ by less than the quantisation itself
# changes: in MiniLM by up to 0.6 of it. With this share of the quantisation's change as base error, the limit
# is all of it. `given_rounding` has the narrow limit.
_QUANTIZATION_SHARE = 1 / MULTIPLE
# The multiple for a quantised graph given its own integers. Eager PyTorch's integer products are exact, so
# what is left of its error is smaller than the approximations in a runtime's kernels: correct graphs of
# MiniLM at four ratios and of 12 small models reach 5.4.
GIVEN_MULTIPLE = 8.0


@dataclass(frozen=True)
class Budget:
    """Base error of one output in one case: the error of eager PyTorch itself in the same precision.

    Attributes:
        relative_frobenius: Norm of the error as a share of the norm of the reference.
        max_abs: Largest error of a single value, as a share of the largest value of the reference.
        p999_abs: 99.9th percentile of the errors, as a share of the same value.
    """

    relative_frobenius: float
    max_abs: float
    p999_abs: float

    def used(self, found: Deviation) -> float:
        """Return the smallest multiple of the base error with which a deviation would have passed.

        The result is NaN if the deviation is not finite.
        """
        shares = _shares(found)
        return max(
            shares.relative_frobenius / self.relative_frobenius,
            shares.max_abs / self.max_abs,
            shares.p999_abs / self.p999_abs,
        )

    def allows(self, found: Deviation, multiple: float = MULTIPLE) -> bool:
        """Return whether a deviation is within the limit. NaN never is."""
        return found.finite and self.used(found) <= multiple

    def of_part(self, whole: float, part: float) -> "Budget":
        """The base error of a part of an output, such as a row.

        A row of small values, for example a text between two classes, is not more exact for that reason: its
        values come from sums as large as those of the other rows.

        Args:
            whole: Largest absolute value of the output.
            part: Largest absolute value of the part.
        """
        return self if not 0 < part < whole else self.times(whole / part)

    def times(self, factor: float) -> "Budget":
        """The base error multiplied by a factor."""
        return _rounded(_times(self, factor))


def quantization_share(precision: str) -> float | None:
    """The share of a quantisation's change that is the base error of its graphs.

    None if the base error is eager PyTorch's own error in the precision, as for precisions without
    quantisation. In half precision so many activations fall to the other side that this error, measured with
    eager PyTorch's own rounding, is representative; in float32 few do, and it varies by chance.
    """
    kind = find_precision(precision)
    return _QUANTIZATION_SHARE if kind.quantizes and not kind.is_half else None


def make_budgets(eager: Sequence[Mapping[str, Deviation]], precision: str) -> list[dict[str, Budget]]:
    """Compute the base errors of cases from the deviations of eager PyTorch in a precision.

    Eager PyTorch may be exact by chance if an output has few values. So the base error is at least the value
    that one case in five exceeds, and at least the epsilon of the precision. One case that amplifies rounding
    does not widen the limit of the others. An output that is near zero by chance (one number, in a case of
    one row of one token) is not more exact for that reason. So the base error is also at least the median
    of the cases' absolute errors divided by the output's scale.

    Args:
        eager: For each case and output, the deviation of eager PyTorch in that precision from eager PyTorch
            in float64.
        precision: The name of that precision.
    """
    outputs = {name for case in eager for name in case}
    found = {output: [case[output] for case in eager if output in case] for output in outputs}
    usual = {output: _usual(deviations, precision) for output, deviations in found.items()}
    absolute = {
        output: _combine(_median, [_times(_shares(d), d.scale) for d in deviations])
        for output, deviations in found.items()
    }
    return [
        {
            output: _base([_shares(d), usual[output], _times(absolute[output], 1 / d.scale)])
            for output, d in case.items()
        }
        for case in eager
    ]


def scaled(budgets: Mapping[str, Budget], factor: float) -> dict[str, Budget]:
    """Multiply the base errors of a case's outputs by a factor."""
    return {output: budget.times(factor) for output, budget in budgets.items()}


def widened(budget: Budget, found: Deviation) -> Budget:
    """The larger of a base error and of the error of another run of eager PyTorch."""
    return _base([budget, _shares(found)])


def make_pooled_budgets(eager: Sequence[Deviation], precision: str) -> list[Budget]:
    """Compute the base errors of values of different kinds, such as the outputs of a model's modules.

    This is `make_budgets` without the absolute errors, because the scale of one module's output says nothing
    about that of another.
    """
    usual = _usual(eager, precision)
    return [_base([_shares(d), usual]) for d in eager]


def _usual(deviations: Sequence[Deviation], precision: str) -> Budget:
    """Return the minimum base error: the value that one in five exceeds, and at least the epsilon."""
    epsilon = find_precision(precision).epsilon
    typical = _combine(_typical, [_shares(d) for d in deviations])
    return _combine(max, [typical, Budget(epsilon, epsilon, epsilon)])


def _base(least: Sequence[Budget]) -> Budget:
    return _rounded(_combine(max, least))


def _rounded(budget: Budget) -> Budget:
    """Round to three digits, the number of digits in messages."""
    return Budget(**{f.name: float(f"{getattr(budget, f.name):.3g}") for f in fields(Budget)})


def _typical(values: Sequence[float]) -> float:
    """Return the value that one in five exceeds.

    With normally distributed errors and a single value to compare, 4 times this is 5 standard deviations.
    """
    return float(np.quantile(values, 0.8, method="lower"))


def _median(values: Sequence[float]) -> float:
    return float(np.quantile(values, 0.5, method="lower"))


def _times(budget: Budget, factor: float) -> Budget:
    return Budget(**{f.name: getattr(budget, f.name) * factor for f in fields(Budget)})


def _shares(found: Deviation) -> Budget:
    return Budget(found.relative_frobenius, found.max_abs / found.scale, found.p999_abs / found.scale)


def _combine(function: Callable[[Sequence[float]], float], budgets: Sequence[Budget]) -> Budget:
    """Apply a function to several budgets, field by field."""
    return Budget(**{f.name: function([getattr(b, f.name) for b in budgets]) for f in fields(Budget)})
