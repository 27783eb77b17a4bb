"""Assembling in eager PyTorch: a stack whose layers are original ones and modules.

A module is a copy of one of the layers that it replaces, with weights of its own. What only the first layer
of a stack holds for all the others (T5's position bias) stays the backbone's, whoever comes first.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from variator_export.core.assembly import Assembly, Stack
from variator_export.core.errors import UserError
from variator_export.core.precision import Precision
from variator_export.model.backbone import Backbone, copy_sharing_weights
from variator_export.model.backbone_info import BackboneInfo
from variator_export.model.families.base import Family
from variator_export.model.modular.layout import ModuleGroup, module_for, prefix_of, weight_name
from variator_export.model.modular.weights import ModuleSet


def layers_of(backbone: Backbone, stack: Stack) -> nn.ModuleList:
    """The layers of a stack."""
    base: Any = getattr(backbone.model, "base_model", backbone.model)
    layers: nn.ModuleList = base.get_submodule(backbone.spec.family.stack_path(stack))
    return layers


def replace_layers(layers: nn.ModuleList, chosen: Sequence[nn.Module]) -> None:
    """Put other layers into a stack. A decoder's layers find their keys and values by their number."""
    del layers[:]
    layers.extend(chosen)
    for index, layer in enumerate(chosen):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]


def refuse_assembly(info: BackboneInfo) -> None:
    """Refuse a backbone whose layers cannot be left out or replaced.

    Raises:
        UserError: It is one.
    """
    if (reason := info.spec.family.refuse_assembly(info.config)) is not None:
        raise UserError(
            f"The layers of {info.source.name} cannot be replaced by modules: {reason}.",
            "Use compression plugins, or another backbone.",
        )


def own_state(family: Family, layer: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a layer that a module has for itself, by name."""
    kept = family.first_layer_tensors
    return {name: tensor for name, tensor in layer.state_dict().items() if name not in kept}


def trainable(family: Family, layer: nn.Module) -> nn.Module:
    """Let the weights of a module be trained. What it shares with the backbone is no longer a part of it."""
    for tensor in family.first_layer_tensors:
        parent, _, child = tensor.rpartition(".")[0].rpartition(".")
        owner = layer.get_submodule(parent)
        if child in dict(owner.named_children()):
            shared = owner.get_submodule(child)
            delattr(owner, child)
            # Still there for the layer's own code, but in no list of parameters and in no state dict.
            object.__setattr__(owner, child, shared)
    return layer.requires_grad_(True)


def copied_layer(backbone: Backbone, stack: Stack, group: ModuleGroup) -> nn.Module:
    """A module in the state in which training starts: a copy of one of the layers that it replaces."""
    layers = layers_of(backbone, stack)
    layer = copy.deepcopy(layers[group.like])
    if group.first == 0:
        _make_first(backbone.spec.family, layer, layers[0])
    return layer


def _make_first(family: Family, layer: nn.Module, original: nn.Module) -> None:
    """Let a layer be the first of its stack: it shares what only the first layer holds."""
    if family.share_first is not None:
        family.share_first(layer, original)


def loaded_layer(backbone: Backbone, modules: ModuleSet, index: int) -> nn.Module:
    """A module with its weights, frozen, in the backbone's type.

    Raises:
        UserError: The tensors are not those of the layer that the module is like.
    """
    config = modules.config
    group = config.modules[index]
    layer = copied_layer(backbone, config.stack, group)
    expected, found = own_state(backbone.spec.family, layer), modules.state(index)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    given = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wrong = [name for name in {**shapes, **given} if shapes.get(name) != given.get(name)]
    if wrong:
        name = wrong[0]
        there = f"the shape {given[name]}" if name in given else "no tensor"
        raise UserError(
            f"The module of the {config.stack}'s layers {group.span} has {there} for {name}; a layer of "
            f"{backbone.info.source.name} has {shapes.get(name, 'none')}.",
            "Use modules that were made for this backbone.",
        )
    layer.load_state_dict(found, strict=False)  # what only the first layer has stays
    return layer.eval().requires_grad_(False)


def assembled(backbone: Backbone, assembly: Assembly, sets: Sequence[ModuleSet]) -> Backbone:
    """The backbone with the layers of an assembly.

    Args:
        backbone: The original, in a floating-point type; left unchanged. The new one shares its weights.
        assembly: The assembly.
        sets: The available modules.

    Raises:
        UserError: The assembly does not add up, a group has no module, or a module does not fit.
    """
    model = copy_sharing_weights(backbone.model)
    new = dataclasses.replace(backbone, model=model)
    configs = [modules.config for modules in sets]
    lengths: dict[str, int] = {}
    buffers: dict[int, str] = {}
    for stack in backbone.info.stack_layers:
        layers, originals = layers_of(new, stack), list(layers_of(backbone, stack))
        chosen: list[nn.Module] = []
        for span in assembly.spans(stack, len(originals)):
            if span.granularity == 1:
                chosen.append(layers[span.first])
            else:
                place, index = module_for(stack, span, configs)
                layer = loaded_layer(backbone, sets[place], index)
                path = backbone.spec.family.stack_path(stack)
                for name, buffer in layer.named_buffers():
                    group = sets[place].config.modules[index]
                    buffers[id(buffer)] = weight_name(sets[place].name, path, group, name)
                chosen.append(layer)
        replace_layers(layers, chosen)
        lengths[stack] = len(chosen)
    info = dataclasses.replace(backbone.info, layers=lengths)
    return dataclasses.replace(new, info=info, module_buffers=buffers)


def in_precision(
    backbone: Backbone, modules: ModuleSet, precision: Precision, kept: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """The tensors of modules in a precision, by their names in `modules.safetensors`.

    Args:
        backbone: The backbone in float32.
        modules: The modules.
        precision: The precision.
        kept: As for `Backbone.in_precision`.
    """
    model = copy_sharing_weights(backbone.model)
    new = dataclasses.replace(backbone, model=model)
    layers = layers_of(new, modules.config.stack)
    for index, group in enumerate(modules.config.modules):
        layers[group.like] = loaded_layer(backbone, modules, index)
    converted = layers_of(new.in_precision(precision, kept), modules.config.stack)
    return {
        f"{prefix_of(index)}{name}": tensor
        for index, group in enumerate(modules.config.modules)
        for name, tensor in own_state(backbone.spec.family, converted[group.like]).items()
    }


def state_of_modules(family: Family, layers: Sequence[nn.Module]) -> dict[str, torch.Tensor]:
    """The tensors of trained modules, by their names in `modules.safetensors`."""
    return {
        f"{prefix_of(index)}{name}": tensor.detach().cpu().float()
        for index, layer in enumerate(layers)
        for name, tensor in own_state(family, layer).items()
    }
