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
from variator_export.graph.any_assembly import any_assembly
from variator_export.graph.assemble import KeptLayer, StackLayers, assemble
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
    stacks = []
    for stack, num_layers in info.stack_layers.items():
        spans = files.assembly.spans(stack, num_layers)
        layers = [_layer(files.root, files.modules, stack, span, info) for span in spans]
        path = info.spec.family.stack_path(stack)
        stacks.append(StackLayers(path, layers, num_layers, is_decoder=stack == DECODER_STACK))
    assemble(model, stacks, info.size.hidden_size)


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
    root = any_ratio.parent
    layers = [_layer(root, folders, ENCODER_STACK, branch.span, info) for branch in branches]
    path = info.spec.family.stack_path(ENCODER_STACK)
    spans = [branch.span for branch in branches]
    return any_assembly(any_ratio, path, layers, spans, info.size.hidden_size)


def _layer(root: Path, folders: Sequence[str], stack: Stack, span: Span, info: BackboneInfo) -> KeptLayer:
    if span.granularity == 1:
        return KeptLayer(span.first)
    configs = [load_module_config(root / folder) for folder in folders]
    place, index = module_for(stack, span, configs)
    folder, prefix = folders[place], prefix_of(index)
    stored = external_tensors(root, _tensors_of(root, folder))
    own = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
    group, path = configs[place].modules[index], info.spec.family.stack_path(stack)
    for key, tensor in own.items():
        tensor.name = weight_name(Path(folder).name, path, group, key)
    return KeptLayer(group.like, own)


def _tensors_of(root: Path, folder: str) -> str:
    """The file that graphs read a folder's modules from."""
    names: Sequence[str] = (QUANTIZED_MODULES_NAME, MODULE_TENSORS_NAME)
    return next(f"{folder}/{name}" for name in names if (root / folder / name).exists())
