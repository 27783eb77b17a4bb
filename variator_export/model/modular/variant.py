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
from variator_export.model.quantization.layers import QuantizedLinear


def modular_model(backbone: Backbone, files: VariantFiles) -> nn.Module:
    """The eager model of an assembly.

    Args:
        backbone: The original, in any precision; left unchanged.
        files: The variant's files, in the bundle of the backbone's precision.
    """
    assert files.assembly is not None
    quantized = any(isinstance(module, QuantizedLinear) for module in backbone.model.modules())
    sets = [load_bundled(files.root / folder, quantized=quantized) for folder in files.modules]
    other = assembled(backbone, files.assembly, sets)
    if files.plugin is None:
        return PlainModel(other)
    num_layers = len(layers_of(backbone, ENCODER_STACK))
    layers = kept_layers(files.assembly, ENCODER_STACK, num_layers, [modules.config for modules in sets])
    plugin = CompressionPlugin.from_file(load_plugin(files.plugin_folder)).of_layers(layers)
    return AugmentedModel(other, plugin.to(backbone.dtype))


def kept_layers(assembly: Assembly, stack: Stack, num_layers: int, sets: Sequence[ModuleConfig]) -> list[int]:
    """The layer of the original that each layer of an assembly is, or is like: its part of a plugin too."""

    def layer_of(span: Span) -> int:
        if span.granularity == 1:
            return span.first
        place, index = module_for(stack, span, sets)
        return sets[place].modules[index].like

    return [layer_of(span) for span in assembly.spans(stack, num_layers)]
