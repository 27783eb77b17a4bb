"""Bisection of an assembly: one name for each of its layers, in eager PyTorch and in graphs.

A graph keeps the names of the original layers. In eager PyTorch the layers of an assembly are numbered anew.
Here an original layer keeps its number, and a module is named by the layers that it replaces, as in
`encoder.layer.2-3`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from variator_export.core.assembly import Assembly, Span
from variator_export.engines.eager import EagerModel
from variator_export.graph.simplify import MODULE_KEY, module_of
from variator_export.model.backbone_info import BackboneInfo
from variator_export.model.modular.layout import ModuleConfig
from variator_export.model.modular.variant import kept_layers


class AssembledRunner:
    """An assembly in eager PyTorch, as it is bisected.

    Args:
        eager: The model.
        names: Names by those of the modules that hold a layer (`eager_names`).
    """

    def __init__(self, eager: EagerModel, names: Mapping[str, str]) -> None:
        self.transformer = _Renamed(eager.transformer, names)
        self.run = eager.run
        self.decoder_step = eager.decoder_step


def eager_names(info: BackboneInfo, assembly: Assembly) -> dict[str, str]:
    """The names of layers, by their names in the eager model of an assembly."""
    return {
        f"{path}.{index}": f"{path}.{span}"
        for path, spans in _spans(info, assembly)
        for index, span in enumerate(spans)
    }


def graph_names(info: BackboneInfo, assembly: Assembly, modules: Sequence[ModuleConfig]) -> dict[str, str]:
    """The names of layers, by their names in an assembly's own graphs: those of the trace."""
    kept = {
        info.spec.family.stack_path(stack): kept_layers(assembly, stack, count, modules)
        for stack, count in info.stack_layers.items()
    }
    return {
        f"{path}.{layer}": f"{path}.{span}"
        for path, spans in _spans(info, assembly)
        for layer, span in zip(kept[path], spans, strict=True)
    }


def _spans(info: BackboneInfo, assembly: Assembly) -> Iterator[tuple[str, Sequence[Span]]]:
    """Yield the name of the module that holds a stack, and what each layer of the stack stands for."""
    for stack, count in info.stack_layers.items():
        yield info.spec.family.stack_path(stack), assembly.spans(stack, count)


class _Renamed:
    """A model whose modules have other names."""

    def __init__(self, model: Any, names: Mapping[str, str]) -> None:
        self._model, self._names = model, names

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        """Yield names and modules."""
        for name, module in self._model.named_modules():
            yield renamed(name, self._names), module


def rename_layers(model: ir.Model, names: Mapping[str, str]) -> ir.Model:
    """Name the layers of an assembly's own graph in place (`graph_names`); returns the graph."""
    for node in model.graph:
        if module := module_of(node):
            node.metadata_props[MODULE_KEY] = renamed(module, names)
    return model


def renamed(name: str, names: Mapping[str, str]) -> str:
    """A module's name with that of its layer replaced."""
    for old, new in names.items():
        before, found, rest = f".{name}.".partition(f".{old}.")
        if found:
            return f"{before}.{new}.{rest}".strip(".")
    return name
