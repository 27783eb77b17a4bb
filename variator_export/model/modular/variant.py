"""The eager model of an assembly, with or without a compression plugin."""

from collections.abc import Sequence

from torch import nn

from variator_export.bundle.variant_files import VariantFiles
from variator_export.core.assembly import ENCODER_STACK, Assembly, Span, Stack
from variator_export.model.augmented import AugmentedModel, PlainModel
from variator_export.model.backbone import Backbone
from variator_export.model.modular.assembled import assembled, layers_of
from variator_export.model.modular.layout import ModuleConfig, module_for
from variator_export.model.modular.weights import load_bundled
from variator_export.model.plugin import CompressionPlugin
from variator_export.model.plugin_file import load_plugin
from variator_export.model.plugin_layout import Plugin, null_plugin
from variator_export.model.quantization.layers import QuantizedLinear


def modular_model(backbone: Backbone, files: VariantFiles) -> nn.Module:
    """The eager model of an assembly.

    Args:
        backbone: The original, in any precision; left unchanged.
        files: The variant's files, in the bundle of the backbone's precision.
    """
    other, layers = _assembled(backbone, files)
    if files.plugin is None:
        return PlainModel(other)
    return _augmented(other, load_plugin(files.plugin_folder), layers)


def traced_form(backbone: Backbone, files: VariantFiles) -> AugmentedModel:
    """The eager model of an assembly with the modules that graphs were traced from: always with a plugin.

    Arguments are those of `modular_model`. Without a plugin, it is the one of zeros, which changes nothing.
    """
    other, layers = _assembled(backbone, files)
    if files.plugin is not None:
        return _augmented(other, load_plugin(files.plugin_folder), layers)
    size = backbone.info.size
    return _augmented(other, null_plugin(size.num_layers, size.hidden_size), layers)


def _assembled(backbone: Backbone, files: VariantFiles) -> tuple[Backbone, list[int]]:
    """The backbone of an assembly, and the layer of the original that each of its layers is like."""
    assert files.assembly is not None
    quantized = any(isinstance(module, QuantizedLinear) for module in backbone.model.modules())
    sets = [load_bundled(files.root / folder, quantized=quantized) for folder in files.modules]
    num_layers = len(layers_of(backbone, ENCODER_STACK))
    layers = kept_layers(files.assembly, ENCODER_STACK, num_layers, [modules.config for modules in sets])
    return assembled(backbone, files.assembly, sets), layers


def _augmented(backbone: Backbone, plugin: Plugin, layers: Sequence[int]) -> AugmentedModel:
    part = CompressionPlugin.from_file(plugin).of_layers(layers)
    return AugmentedModel(backbone, part.to(backbone.dtype))


def kept_layers(assembly: Assembly, stack: Stack, num_layers: int, sets: Sequence[ModuleConfig]) -> list[int]:
    """The layer of the original that each layer of an assembly is, or is like: its part of a plugin too."""

    def layer_of(span: Span) -> int:
        if span.granularity == 1:
            return span.first
        place, index = module_for(stack, span, sets)
        return sets[place].modules[index].like

    return [layer_of(span) for span in assembly.spans(stack, num_layers)]
