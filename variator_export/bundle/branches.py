"""The branches of the graph that runs every assembly of a bundle (`graph.assemblies.any_assembly`)."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from variator_export.core.assembly import DECODER_STACK, ENCODER_STACK, Assembly, Span, Stack
from variator_export.core.axes import KINDS, present_name

# The input that says which branches run, bool (branches,). By default the original layers do.
BRANCHES_INPUT = "assembly.branches"


class Branch(BaseModel):
    """An original layer or a module, as a branch.

    Attributes:
        stack: The stack.
        first: The first layer that the branch stands for.
        last: The last one.
        modules: Name of the folder that has the module; None for an original layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stack: Stack = ENCODER_STACK
    first: int
    last: int
    modules: str | None = None

    @property
    def span(self) -> Span:
        """The layers that the branch stands for."""
        return Span(self.first, self.last)


def branches_of(stack: Stack, num_layers: int, used: Iterable[Mapping[Span, str]]) -> tuple[Branch, ...]:
    """The branches of a stack for some assemblies, in the order of the layers that they begin with.

    Args:
        stack: The stack.
        num_layers: Original layers.
        used: For each assembly, the folder that has the module of each span.

    Returns:
        No branches if no assembly has a module in the stack.
    """
    modules = {
        Branch(stack=stack, first=span.first, last=span.last, modules=name)
        for spans in used
        for span, name in spans.items()
    }
    if not modules:
        return ()
    original = {Branch(stack=stack, first=index, last=index) for index in range(num_layers)}
    return tuple(
        sorted(original | modules, key=lambda branch: (branch.first, branch.last, branch.modules or ""))
    )


def switches(
    branches: Sequence[Branch],
    assembly: Assembly | None,
    modules: Collection[str],
    stack_layers: Mapping[Stack, int],
) -> np.ndarray:
    """The value of `assembly.branches` for an assembly, bool (branches,).

    Args:
        branches: The graph's branches.
        assembly: The assembly; None for the original layers.
        modules: Names of the folders of modules that the assembly takes.
        stack_layers: Original layers of each stack.
    """
    spans = {stack: (assembly or Assembly()).spans(stack, count) for stack, count in stack_layers.items()}
    return np.array(
        [
            branch.span in spans[branch.stack] and (branch.modules is None or branch.modules in modules)
            for branch in branches
        ]
    )


def projection_outputs(
    branches: Sequence[Branch], assembly: Assembly | None, stack_layers: Mapping[Stack, int]
) -> dict[str, str] | None:
    """The outputs of the graph that runs every assembly with an assembly's keys and values for the decoder.

    Args:
        branches: The graph's branches.
        assembly: The assembly; None for the original layers.
        stack_layers: Original layers of each stack.

    Returns:
        Their names, by those that they have in the assembly's own graph. None if the decoder has no branches.
    """
    if not any(branch.stack == DECODER_STACK for branch in branches):
        return None
    spans = (assembly or Assembly()).spans(DECODER_STACK, stack_layers[DECODER_STACK])
    return {
        present_name(index, ENCODER_STACK, kind): present_name(span, ENCODER_STACK, kind)
        for index, span in enumerate(spans)
        for kind in KINDS
    }
