"""The contents of a folder of modules: its configuration, and the names of its tensors.

A folder holds the modules of one granularity, for one stack of a backbone. A module has the architecture of
one of the layers that it replaces, so its tensors have that layer's names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from variator_export.core.assembly import Assembly, Span, Stack
from variator_export.core.errors import UserError
from variator_export.model.plugin_layout import BackboneIdentity

# Configuration with which pydantic reads the two classes below from a file.
_NOTHING_ELSE = {"extra": "forbid"}


@dataclass(frozen=True)
class ModuleGroup:
    """The layers that a module replaces.

    Attributes:
        first: Index of the first layer in the backbone's stack, from 0.
        last: Index of the last layer.
        like: Index of the layer whose architecture the module has, and from which its training started.

    Raises:
        ValueError: The layers are not in order, or `like` is none of them.
    """

    __pydantic_config__ = _NOTHING_ELSE

    first: int
    last: int
    like: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.like <= self.last:
            raise ValueError(
                f"'like' is {self.like}, the layers are {self.first} to {self.last}: it has to be one of them"
            )

    @property
    def span(self) -> Span:
        """The layers."""
        return Span(self.first, self.last)


@dataclass(frozen=True, kw_only=True)
class ModuleConfig:
    """The content of `module_config.json`.

    Attributes:
        stack: The stack that the modules are for.
        granularity: The number of layers that each module replaces.
        num_layers: Layers of the backbone's stack.
        modules: The layers of each module, in order.
        backbone: The backbone that the modules were made for.
        training: A record of the training: data, settings and loss. None for modules that are copies of
            layers.

    Raises:
        ValueError: The layers of two modules overlap, or are not in the stack.
    """

    __pydantic_config__ = _NOTHING_ELSE

    format_version: Literal[1] = 1
    stack: Stack
    granularity: int
    num_layers: int
    hidden_size: int
    modules: tuple[ModuleGroup, ...]
    backbone: BackboneIdentity | None = None
    training: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.granularity < 2:
            raise ValueError(f"'granularity' is {self.granularity}: it has to be at least 2")
        if not self.modules:
            raise ValueError("'modules' is empty")
        end = 0
        for group in self.modules:
            if group.span.granularity != self.granularity:
                raise ValueError(f"the layers {group.span} are not {self.granularity} layers")
            if group.first < end:
                raise ValueError(f"the layers {group.span} are out of order, or in two modules")
            end = group.last + 1
        if end > self.num_layers:
            raise ValueError(f"layer {end - 1} is not in a stack of {self.num_layers} layers")


def prefix_of(index: int) -> str:
    """Prefix of the names of a module's tensors in `modules.safetensors`, before the layer's own names."""
    return f"modules.{index}."


def whole_assembly(config: ModuleConfig) -> Assembly:
    """The assembly with all modules of a folder, and original layers where it has none."""
    spans = {group.first: group.span for group in config.modules}
    listed: list[int] = []
    while (first := sum(listed)) < config.num_layers:
        listed.append(spans[first].granularity if first in spans else 1)
    return Assembly(**{config.stack: tuple(listed)})


def even_groups(num_layers: int, granularity: int, start: str = "last") -> tuple[ModuleGroup, ...]:
    """Groups of neighbouring layers from the first on; layers that fill no group are left.

    Args:
        num_layers: Layers of the stack.
        granularity: Layers in a group.
        start: The layer of the group that a module is like: `first`, `middle` or `last`.
    """
    offset = {"first": 0, "middle": granularity // 2, "last": granularity - 1}[start]
    firsts = range(0, num_layers - granularity + 1, granularity)
    return tuple(ModuleGroup(first, first + granularity - 1, first + offset) for first in firsts)


def module_for(stack: Stack, span: Span, sets: Sequence[ModuleConfig]) -> tuple[int, int]:
    """Find the module for some layers: the index of its set, and its own index there.

    Raises:
        UserError: No set has one.
    """
    for place, config in enumerate(sets):
        for index, group in enumerate(config.modules):
            if config.stack == stack and group.span == span:
                return place, index
    there = [str(group.span) for config in sets if config.stack == stack for group in config.modules]
    raise UserError(
        f"There is no module for the {stack}'s layers {span}; there are modules for the layers "
        f"{', '.join(there) or 'of no group'} (counted from 0).",
        "Put the granularities in another order, or give a folder of modules that has it: --module DIR",
    )


def weight_name(modules: str, path: str, group: ModuleGroup, name: str) -> str:
    """Name of a module's tensor in graphs: that of the layer it is like, after the folder's name.

    Args:
        modules: Name of the modules' folder.
        path: Path of the stack in the model.
        group: The layers of the module.
        name: The tensor's name in the layer.
    """
    return f"{modules}.{path}.{group.like}.{name}"
