"""How much an exported graph or an engine may differ from eager PyTorch.

The reference is eager PyTorch in float64. Eager PyTorch in the precision P of the graph is off from it by
rounding alone, and a correct graph in P by about as much: it rounds too, only in another order. So the limit
is not a guess but a multiple of what eager's own rounding does on the same inputs, in the same measures. A
fault is not rounding and is far outside.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from variator_export.core.precision import find_precision
from variator_export.verification.compare import Deviation

# A correct graph of MiniLM is off by at most 2.0 times the base error, over ratios 1, 2, 4, 8 and all cases.
MULTIPLE = 4.0


@dataclass(frozen=True)
class Budget:
    """The base error of one output in one case: what eager PyTorch itself is off by in the same precision.

    Attributes:
        relative_frobenius: Of the norm.
        max_abs: Of the single value, as a share of the largest value of the reference.
        p999_abs: Of the 99.9th percentile, likewise.
    """

    relative_frobenius: float
    max_abs: float
    p999_abs: float

    def used(self, found: Deviation) -> float:
        """The smallest multiple of the base error that a deviation would have passed with.

        NaN where it holds NaN or infinite values.
        """
        shares = _shares(found)
        return max(
            shares.relative_frobenius / self.relative_frobenius,
            shares.max_abs / self.max_abs,
            shares.p999_abs / self.p999_abs,
        )

    def allows(self, found: Deviation, multiple: float = MULTIPLE) -> bool:
        """Whether a deviation is within the limit; NaN never is."""
        return found.finite and self.used(found) <= multiple


def make_budgets(eager: Sequence[Mapping[str, Deviation]], precision: str) -> list[dict[str, Budget]]:
    """The base errors of cases, from eager's own deviations in a precision.

    Eager may be exact by chance where an output has few values, so the base is at least what one case in five
    exceeds, and at least the precision itself. One case that amplifies rounding does not widen the limit of
    the others. An output that is near zero by chance (one number, where a case has one row of one token) is
    not more exact for that: the base is at least the median of the cases' absolute errors over its scale.

    Args:
        eager: For each case the deviation of each output of eager in that precision from eager in float64.
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


def make_pooled_budgets(eager: Sequence[Deviation], precision: str) -> list[Budget]:
    """The base errors of values of different kinds, as the outputs of a model's modules.

    As `make_budgets`, but for the absolute errors: the scale of one says nothing of another.
    """
    usual = _usual(eager, precision)
    return [_base([_shares(d), usual]) for d in eager]


def _usual(deviations: Sequence[Deviation], precision: str) -> Budget:
    """The least base error: what one in five exceeds, and the precision itself."""
    epsilon = find_precision(precision).epsilon
    typical = _combine(_typical, [_shares(d) for d in deviations])
    return _combine(max, [typical, Budget(epsilon, epsilon, epsilon)])


def _base(least: Sequence[Budget]) -> Budget:
    return _rounded(_combine(max, least))


def _rounded(budget: Budget) -> Budget:
    """To three digits, which is what is shown."""
    return Budget(**{f.name: float(f"{getattr(budget, f.name):.3g}") for f in fields(Budget)})


def _typical(values: Sequence[float]) -> float:
    """What one in five exceeds. With normal errors and one value to look at, 4 times this is 5 deviations."""
    return float(np.quantile(values, 0.8, method="lower"))


def _median(values: Sequence[float]) -> float:
    return float(np.quantile(values, 0.5, method="lower"))


def _times(budget: Budget, factor: float) -> Budget:
    return Budget(**{f.name: getattr(budget, f.name) * factor for f in fields(Budget)})


def _shares(found: Deviation) -> Budget:
    return Budget(found.relative_frobenius, found.max_abs / found.scale, found.p999_abs / found.scale)


def _combine(function: Callable[[Sequence[float]], float], budgets: Sequence[Budget]) -> Budget:
    """A function of several, field by field."""
    return Budget(**{f.name: function([getattr(b, f.name) for b in budgets]) for f in fields(Budget)})
