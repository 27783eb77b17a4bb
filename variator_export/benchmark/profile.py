"""Profile of a graph: the time of its operators, grouped by the PyTorch modules that they came from."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from variator_export.engines.onnxruntime.graph import OperatorTime

_INDEX = re.compile(r"\.\d+(?=\.|$)")


def profile_rows(times: Sequence[OperatorTime], modules: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a JSON row for each kind of module, the slowest first.

    Args:
        times: Times of the operators.
        modules: Module of each node, by the node's name. The module is empty for nodes that belong to none
            (padding, windows, weights).

    Returns:
        Rows with `module`, in which * replaces the layer numbers and `fused` stands for operators that the
        runtime created from several modules; `milliseconds` of one call; `share` of the total; milliseconds
        by operator in `operators`; and `layers`, in how many layers the module is, None outside of layers.
    """
    groups: dict[str, dict[str, float]] = {}
    members: dict[str, set[str]] = {}
    for time in times:
        module = modules.get(time.node)
        name = "fused" if module is None else _INDEX.sub(".*", module) or "outside of modules"
        members.setdefault(name, set()).add(module or "")
        operators = groups.setdefault(name, {})
        operators[time.operator] = operators.get(time.operator, 0.0) + time.milliseconds
    total = sum(sum(operators.values()) for operators in groups.values()) or 1.0
    rows = [
        {
            "module": name,
            "milliseconds": round(sum(operators.values()), 4),
            "share": round(sum(operators.values()) / total, 4),
            "layers": len(members[name]) if "*" in name else None,
            "operators": {n: round(t, 4) for n, t in sorted(operators.items(), key=lambda i: -i[1])},
        }
        for name, operators in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["milliseconds"])
