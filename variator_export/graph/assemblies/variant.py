"""Assemblies of a bundle as graphs: which layers of the trace stay, and where their weights are."""

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from variator_export.bundle.branches import Branch
from variator_export.bundle.variant_files import (
    MODULE_TENSORS_NAME,
    QUANTIZED_MODULES_NAME,
    VariantFiles,
)
from variator_export.core.assembly import DECODER_STACK, ENCODER_STACK, Span, Stack
from variator_export.graph.assemblies.any_assembly import StackBranches, any_assembly
from variator_export.graph.assemblies.layers import KeptLayer, StackLayers, assemble
from variator_export.graph.weights import external_tensors
from variator_export.model.backbone_info import BackboneInfo
from variator_export.model.modular.files import load_module_config
from variator_export.model.modular.layout import module_for, prefix_of, weight_name


def assemble_variant(model: ir.Model, files: VariantFiles, info: BackboneInfo) -> None:
    """Turn a traced graph into that of a variant's assembly.

    Args:
        model: The graph of the original layers, changed in place.
        files: The variant's files, in the bundle's folder.
        info: The backbone.

    Raises:
        UserError: The assembly does not add up, or a group has no module.
    """
    assert files.assembly is not None
    modules = [_Modules(files.root, folder) for folder in files.modules]
    stacks = []
    for stack, num_layers in info.stack_layers.items():
        spans = files.assembly.spans(stack, num_layers)
        path = info.spec.family.stack_path(stack)
        layers = [_layer(modules, stack, span, path) for span in spans]
        stacks.append(StackLayers(path, layers, num_layers, is_decoder=stack == DECODER_STACK))
    assemble(model, stacks, info.size.hidden_size)


def assemble_decoder(decoder: Path, files: VariantFiles, info: BackboneInfo) -> ir.Model:
    """Build the decoder of a variant's assembly.

    Args:
        decoder: The decoder of the original layers, in the bundle's folder.
        files: The variant's files.
        info: The backbone.
    """
    model = ir.load(decoder)
    assemble_variant(model, files, info)
    return model


def leave_out_layers(model: ir.Model, info: BackboneInfo, stack: Stack, kept: Sequence[int]) -> None:
    """Leave layers of a stack out of a traced graph, in place, to see what they cost.

    Args:
        model: A graph of the original layers.
        info: The backbone.
        stack: The stack.
        kept: The layers that stay, by number.
    """
    layers = [KeptLayer(index) for index in kept]
    path, count = info.spec.family.stack_path(stack), info.stack_layers[stack]
    assemble(
        model,
        [StackLayers(path, layers, count, is_decoder=stack == DECODER_STACK)],
        info.size.hidden_size,
    )


def assemble_any(
    any_ratio: Path, branches: Sequence[Branch], folders: Sequence[str], info: BackboneInfo
) -> ir.Model:
    """Build the graph that runs every assembly of a bundle.

    Args:
        any_ratio: The graph of the original layers that takes plugins as inputs, in the bundle's folder.
        branches: The graph's branches.
        folders: Folders of modules inside the bundle.
        info: The backbone.
    """
    modules = [_Modules(any_ratio.parent, folder) for folder in folders]

    def of_stack(stack: Stack) -> StackBranches | None:
        own = [branch for branch in branches if branch.stack == stack]
        if not own:
            return None
        path = info.spec.family.stack_path(stack)
        layers = [_layer(modules, stack, branch.span, path) for branch in own]
        return StackBranches(path, layers, [branch.span for branch in own])

    return any_assembly(any_ratio, of_stack(ENCODER_STACK), of_stack(DECODER_STACK), info.size.hidden_size)


class _Modules:
    """A folder of modules of a bundle: its name, its configuration, and where its tensors are."""

    def __init__(self, root: Path, folder: str) -> None:
        files = (QUANTIZED_MODULES_NAME, MODULE_TENSORS_NAME)
        file = next(name for name in files if (root / folder / name).exists())
        self.name, self.config = Path(folder).name, load_module_config(root / folder)
        self.tensors = external_tensors(root, f"{folder}/{file}")


def _layer(folders: Sequence[_Modules], stack: Stack, span: Span, path: str) -> KeptLayer:
    if span.granularity == 1:
        return KeptLayer(span.first)
    place, index = module_for(stack, span, [modules.config for modules in folders])
    modules = folders[place]
    group, prefix = modules.config.modules[index], prefix_of(index)
    own = {
        key.removeprefix(prefix): tensor for key, tensor in modules.tensors.items() if key.startswith(prefix)
    }
    for key, tensor in own.items():
        tensor.name = weight_name(modules.name, path, group, key)
    return KeptLayer(group.like, own)
