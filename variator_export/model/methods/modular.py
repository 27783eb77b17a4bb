"""Modular Transformers: layers that do the work of several (arXiv 2306.02379), alone or with a plugin."""

import dataclasses

import numpy as np

from variator_export.bundle.manifest import BackboneEntry, Variant
from variator_export.bundle.variant_files import VariantFiles
from variator_export.core.assembly import ENCODER_STACK
from variator_export.core.axes import InputShapes
from variator_export.core.encoder_size import EncoderSize
from variator_export.model.methods.base import Method
from variator_export.model.methods.baseline import BASELINE
from variator_export.model.methods.variator import VARIATOR


def _with_plugin(*, plugin: bool) -> Method:
    """The method of the layers: an assembly takes plugins as the original does."""
    return VARIATOR if plugin else BASELINE


def _graph_inputs(size: EncoderSize, files: VariantFiles) -> dict[str, np.ndarray]:
    return _with_plugin(plugin=files.plugin is not None).graph_inputs(size, files)


def _graph_input_shapes(backbone: BackboneEntry, variant: Variant) -> InputShapes:
    return _with_plugin(plugin=variant.plugin is not None).graph_input_shapes(backbone, variant)


def _macs(size: EncoderSize, variant: Variant, batch_size: int, length: int) -> int:
    assert variant.assembly is not None
    layers = len(variant.assembly.spans(ENCODER_STACK, size.num_layers))
    method = _with_plugin(plugin=variant.plugin is not None)
    cross = size.cross_size
    if decoder := variant.assembly.decoder:
        cross = cross * len(decoder) // sum(decoder)
    own = dataclasses.replace(size, num_layers=layers, cross_size=cross)
    return method.macs(own, variant, batch_size, length)


MODULAR = Method(
    name="modular",
    is_baseline=False,
    tensors=VARIATOR.tensors,
    graph_inputs=_graph_inputs,
    graph_input_shapes=_graph_input_shapes,
    shape_label=lambda variant: _with_plugin(plugin=variant.plugin is not None).shape_label(variant),
    macs=_macs,
    module="variator_export.model.modular.variant:modular_model",
    binder="variator_export.graph.binders:modular",
)
