"""Variator: compression plugins around the feed-forward networks (arXiv 2310.15724)."""

import numpy as np

from variator_export.bundle.manifest import BackboneEntry, Variant
from variator_export.bundle.variant_files import VariantFiles
from variator_export.core.axes import InputShapes
from variator_export.core.encoder_size import EncoderSize
from variator_export.model.macs import analytic_macs
from variator_export.model.methods.base import Method
from variator_export.model.plugin_file import load_plugin
from variator_export.model.plugin_layout import (
    TENSORS_NAME,
    PluginConfig,
    plugin_input_shapes,
    stack_for_graph,
)


def _graph_inputs(_size: EncoderSize, files: VariantFiles) -> dict[str, np.ndarray]:
    return stack_for_graph(load_plugin(files.plugin_folder))


def _graph_input_shapes(backbone: BackboneEntry, variant: Variant) -> InputShapes:
    assert variant.plugin is not None
    config = PluginConfig(
        ratio=variant.ratio,
        bottleneck_size=variant.plugin.bottleneck_size,
        hidden_size=backbone.hidden_size,
        num_layers=backbone.num_layers,
    )
    return plugin_input_shapes(config)


def _macs(size: EncoderSize, variant: Variant, batch_size: int, length: int) -> int:
    assert variant.plugin is not None
    return analytic_macs(size, batch_size, length, variant.ratio, variant.plugin.bottleneck_size)


VARIATOR = Method(
    name="variator",
    is_baseline=False,
    tensors=(TENSORS_NAME,),
    graph_inputs=_graph_inputs,
    graph_input_shapes=_graph_input_shapes,
    shape_label=lambda variant: f"{variant.ratio}x{variant.plugin.bottleneck_size if variant.plugin else 1}",
    macs=_macs,
    module="variator_export.model.augmented:augmented_model",
    binder="variator_export.graph.binders:variator",
)
