"""Tracing: exporting each part of the backbone once."""

from pathlib import Path

import onnx_ir as ir
import torch

from variator_export.core.parts import DECODER
from variator_export.graph.attention import fuse_attention
from variator_export.graph.defaults import set_defaults
from variator_export.graph.export import check_inline
from variator_export.graph.simplify import name_nodes, simplify
from variator_export.graph.trace_decoder import trace_decoder
from variator_export.graph.trace_encoder import trace_encoder
from variator_export.graph.weights import attach_weights, external_tensors
from variator_export.model.backbone import Backbone
from variator_export.model.weights_file import write_weights

# The first opset with Attention. ONNX Runtime 1.23 and TensorRT for RTX 1.7 support it.
ATTENTION_OPSET = 23


def trace(
    backbone: Backbone, folder: Path, weights_name: str, opset: int = ATTENTION_OPSET
) -> dict[str, ir.Model]:
    """Trace every part of the backbone and write the weights that the parts use, each once.

    Args:
        backbone: The loaded backbone; left unchanged.
        folder: Folder for the weights file.
        weights_name: Name of the weights file.
        opset: ONNX opset of the graphs. Below 23, attention is matrix products and a softmax.

    Returns:
        The graphs by part: the any-ratio graph of the part with plugins (`trace_encoder`), and the decoder of
        a model that generates text (`trace_decoder`).
    """
    traces = {backbone.info.part: trace_encoder(backbone, opset)}
    if backbone.info.decoder_size is not None:
        traces[DECODER] = trace_decoder(backbone, opset)
    for traced in traces.values():
        simplify(traced.model, fuse_norms=backbone.dtype == torch.float32)
        if opset >= ATTENTION_OPSET:
            fuse_attention(traced.model)
        check_inline(traced.model.graph)
    state = backbone.state
    used = {name for traced in traces.values() for name in traced.weights}
    write_weights({name: state[name] for name in used}, folder / weights_name)
    stored = external_tensors(folder, weights_name)
    for traced in traces.values():
        attach_weights(traced.model.graph, stored)
        set_defaults(traced.model.graph, traced.defaults)
        name_nodes(traced.model)
    return {part: traced.model for part, traced in traces.items()}
