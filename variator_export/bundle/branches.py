"""The branches of the graph that runs every assembly of a bundle (`graph.any_assembly`)."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from variator_export.core.assembly import ENCODER_STACK, Assembly, Span

# The input that says which branches run, bool (branches,). By default the original layers do.
BRANCHES_INPUT = "assembly.branches"


class Branch(BaseModel):
    """An original layer or a module, as a branch.

    Attributes:
        first: The first layer that the branch stands for.
        last: The last one.
        modules: Name of the folder that has the module; None for an original layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: int
    last: int
    modules: str | None = None

    @property
    def span(self) -> Span:
        """The layers that the branch stands for."""
        return Span(self.first, self.last)


def branches_of(num_layers: int, used: Iterable[Mapping[Span, str]]) -> tuple[Branch, ...]:
    """The branches for some assemblies, in the order of the layers that they begin with.

    Args:
        num_layers: Original layers.
        used: For each assembly, the folder that has the module of each span.
    """
    found = {Branch(first=index, last=index) for index in range(num_layers)}
    found |= {
        Branch(first=span.first, last=span.last, modules=name)
        for spans in used
        for span, name in spans.items()
    }
    return tuple(sorted(found, key=lambda branch: (branch.first, branch.last, branch.modules or "")))


def switches(
    branches: Sequence[Branch], assembly: Assembly | None, modules: Collection[str], num_layers: int
) -> np.ndarray:
    """The value of `assembly.branches` for an assembly, bool (branches,).

    Args:
        branches: The graph's branches.
        assembly: The assembly; None for the original layers.
        modules: Names of the folders of modules that the assembly takes.
        num_layers: Original layers.
    """
    spans = (assembly or Assembly()).spans(ENCODER_STACK, num_layers)
    return np.array(
        [
            branch.span in spans and (branch.modules is None or branch.modules in modules)
            for branch in branches
        ]
    )
