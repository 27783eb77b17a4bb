"""The baseline method: the backbone itself, with a plugin of ratio 1 that changes nothing."""

import numpy as np

from variator_export.bundle.manifest import BackboneEntry, Variant
from variator_export.bundle.variant_files import VariantFiles
from variator_export.core.axes import InputShapes
from variator_export.core.encoder_size import EncoderSize
from variator_export.model.macs import analytic_macs
from variator_export.model.methods.base import Method
from variator_export.model.plugin_layout import null_plugin, plugin_input_shapes, stack_for_graph


def _graph_inputs(size: EncoderSize, _files: VariantFiles) -> dict[str, np.ndarray]:
    return stack_for_graph(null_plugin(size.num_layers, size.hidden_size))


def _graph_input_shapes(backbone: BackboneEntry, _variant: Variant) -> InputShapes:
    return plugin_input_shapes(null_plugin(backbone.num_layers, backbone.hidden_size).config)


def _macs(size: EncoderSize, _variant: Variant, batch_size: int, length: int) -> int:
    return analytic_macs(size, batch_size, length)


BASELINE = Method(
    name="none",
    is_baseline=True,
    tensors=(),
    graph_inputs=_graph_inputs,
    graph_input_shapes=_graph_input_shapes,
    shape_label=lambda _variant: "1x1",
    macs=_macs,
    module="variator_export.model.augmented:plain_model",
    binder="variator_export.graph.binders:baseline",
)
