"""Variants that nobody should deploy: another variant is faster and loses less."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from variator_export.bundle.quality_report import counted_losses


@dataclass(frozen=True)
class Dominated:
    """A variant that is slower and worse than another one.

    Attributes:
        variant: The variant's name.
        by: The variant to take instead.
    """

    variant: str
    by: str

    def text(self) -> str:
        """The finding in words."""
        better = f"{self.by} is faster at every shape and loses no more of any metric"
        return f"Do not deploy {self.variant}: {better}."


def dominated_variants(
    variants: Sequence[str],
    qualities: Sequence[Mapping[str, Any]],
    benchmark: Mapping[str, Any] | None,
    runtime: str = "onnxruntime",
) -> list[Dominated]:
    """Find the variants that are slower than another variant and lose as much or more.

    Slower means at every shape, by more than the intervals of the speed-ups. A variant that was not timed at
    a shape, or not evaluated, is never compared.

    Args:
        variants: Names of the bundle's variants.
        qualities: Results of `evaluate`, as `quality_of_graphs` returns them.
        benchmark: The stored benchmark. None if there is none.
        runtime: The runtime whose speed counts.
    """
    shapes = [
        rows
        for shape in (benchmark or {"shapes": []})["shapes"]
        if (rows := {row["variant"]: row for row in shape["rows"] if row["runtime"] == runtime})
    ]
    losses = {
        name: {
            (place, metric): lost
            for place, quality in enumerate(qualities)
            for metric, lost in counted_losses(quality, name).items()
        }
        for name in variants
    }

    def beats(other: str, name: str) -> bool:
        if not shapes or not losses[name] or losses[name].keys() != losses[other].keys():
            return False
        return all(
            name in rows and other in rows and rows[other]["speedup_low"] > rows[name]["speedup_high"]
            for rows in shapes
        ) and all(losses[other][metric] <= lost for metric, lost in losses[name].items())

    found = []
    for name in variants:
        better = [other for other in variants if other != name and beats(other, name)]
        if better:  # the one that loses least
            found.append(Dominated(name, min(better, key=lambda other: sum(losses[other].values()))))
    return found
