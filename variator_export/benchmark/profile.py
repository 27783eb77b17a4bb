"""Where time goes: the operators of a graph, grouped by the PyTorch modules that they came from."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from variator_export.engines.onnxruntime.graph import OperatorTime

_INDEX = re.compile(r"\.\d+(?=\.|$)")


def profile_rows(times: Sequence[OperatorTime], modules: Mapping[str, str]) -> list[dict[str, Any]]:
    """A JSON row for each kind of module, the slowest first.

    Args:
        times: Of the operators.
        modules: Of each node by its name; empty for nodes of none (padding, windows, weights).

    Returns:
        `module`: with * for the numbers of layers; operators that the runtime made of several modules are
        `fused`; `milliseconds` of one call; `share`; milliseconds by `operators`.
    """
    groups: dict[str, dict[str, float]] = {}
    for time in times:
        module = modules.get(time.node)
        name = "fused" if module is None else _INDEX.sub(".*", module) or "outside of modules"
        operators = groups.setdefault(name, {})
        operators[time.operator] = operators.get(time.operator, 0.0) + time.milliseconds
    total = sum(sum(operators.values()) for operators in groups.values()) or 1.0
    rows = [
        {
            "module": name,
            "milliseconds": round(sum(operators.values()), 4),
            "share": round(sum(operators.values()) / total, 4),
            "operators": {n: round(t, 4) for n, t in sorted(operators.items(), key=lambda i: -i[1])},
        }
        for name, operators in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["milliseconds"])
