"""The trace of a decoder that takes one token and the keys and values of those before.

The past may be empty, so the same graph takes the first token: the keys and values of the encoder are inputs
too, which the encoder's graph computes once for each text.
"""

import onnx_ir as ir
import torch
from torch import Tensor

from variator_export.core.axes import (
    BATCH,
    ENCODER_MASK,
    LENGTH,
    PAST_LENGTH,
    past_by_layer,
    past_names,
    present_names,
)
from variator_export.graph.export import Traced, detach_parameters, export
from variator_export.graph.simplify import name_modules
from variator_export.model.backbone import Backbone
from variator_export.model.decoders.decoding import DecoderStep

# No size of the example may be 1 or equal to another size: the exporter could treat it as a constant.
_EXAMPLE_BATCH, _EXAMPLE_LENGTH, _EXAMPLE_PAST = 2, 7, 5
_INPUTS = (ENCODER_MASK, "input_ids")
LOGITS = "logits"


def trace_decoder(backbone: Backbone, opset: int) -> Traced:
    """Trace the decoder of a model that generates text.

    Args:
        backbone: The loaded backbone; left unchanged.
        opset: ONNX opset of the graph.

    Returns:
        A graph with the inputs `encoder_attention_mask` (batch_size, sequence_length), `input_ids`
        (batch_size, 1) and `past_key_values.LAYER.STACK.KIND`, and the outputs `logits` (batch_size, 1,
        vocabulary) and `present.LAYER.decoder.KIND`.
    """
    size = backbone.info.decoder_size
    assert size is not None
    traced = DecoderStep(backbone.model).eval().requires_grad_(False)
    batch, length, past = (torch.export.Dim(name, min=1) for name in (BATCH, LENGTH, PAST_LENGTH))
    count = 2 * size.num_layers
    dtype = backbone.dtype

    def states(tokens: int) -> list[Tensor]:
        shape = (_EXAMPLE_BATCH, size.num_heads, tokens, size.head_size)
        return [torch.zeros(shape, dtype=dtype) for _ in range(count)]

    arguments = {
        ENCODER_MASK: torch.ones((_EXAMPLE_BATCH, _EXAMPLE_LENGTH), dtype=torch.int64),
        "input_ids": torch.ones((_EXAMPLE_BATCH, 1), dtype=torch.int64),
        "own": states(_EXAMPLE_PAST),
        "cross": states(_EXAMPLE_LENGTH),
    }
    dynamic_shapes = {
        ENCODER_MASK: {0: batch, 1: length},
        "input_ids": {0: batch},
        "own": [{0: batch, 2: past}] * count,
        "cross": [{0: batch, 2: length}] * count,
    }
    inputs = [*_INPUTS, *past_names(size.num_layers, "decoder"), *past_names(size.num_layers, "encoder")]
    outputs = [LOGITS, *present_names(size.num_layers, "decoder")]
    model = export(traced, arguments, dynamic_shapes, (inputs, outputs), opset)
    name_modules(model, prefix="model.")
    used = detach_parameters(model.graph, traced, backbone)
    _sort_inputs(model.graph, [*_INPUTS, *past_by_layer(size.num_layers)])
    model.graph.name = "decoder"
    return Traced(model, used)


def _sort_inputs(graph: ir.Graph, names: list[str]) -> None:
    """Put the inputs into an order. Detached weights, which are inputs for now, come last."""
    place = {name: index for index, name in enumerate(names)}
    inputs = sorted(graph.inputs, key=lambda value: place.get(str(value.name), len(place)))
    graph.inputs.clear()
    graph.inputs.extend(inputs)
