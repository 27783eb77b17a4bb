"""The decoder of the first token, for programs that expect two decoders (Optimum): `decoder_model.onnx`.

It is derived from the decoder with a past, without a trace: the past is empty, and the keys and values of the
cross-attention are computed from the encoder's hidden states. Our sessions take them from its graph.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from variator_export.core.axes import BATCH, KINDS, LENGTH, PAST_LENGTH, past_name, present_name
from variator_export.core.encoder_size import DecoderSize
from variator_export.graph.constants import add_constant
from variator_export.graph.simplify import MODULE_KEY, name_nodes
from variator_export.graph.weights import attach_weights, detach_weights
from variator_export.model.decoders.cross_attention import Projection

HIDDEN_STATES = "encoder_hidden_states"
_HEADS_FIRST = [0, 2, 1, 3]


def first_step(
    decoder: ir.Model,
    projections: Sequence[tuple[Projection, Projection]],
    weights: Mapping[str, ir.TensorProtocol],
    size: DecoderSize,
    hidden_size: int,
) -> ir.Model:
    """Derive the decoder of the first token.

    Args:
        decoder: The decoder with a past, whose weights are external data. It is changed in place.
        projections: The linear layers that make keys and values of the encoder's states, for each layer.
        weights: External data by name.
        size: The decoder's sizes.
        hidden_size: Width of the encoder's hidden states.

    Returns:
        The graph, with the inputs `encoder_attention_mask`, `input_ids` and `encoder_hidden_states`
        (batch_size, sequence_length, hidden size), and the keys and values of both stacks as outputs.
    """
    graph = decoder.graph
    held = dict(detach_weights(graph))
    inputs = {str(value.name): value for value in graph.inputs}
    states = ir.Value(
        name=HIDDEN_STATES,
        shape=ir.Shape([BATCH, LENGTH, hidden_size]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    tape = ir.tape.Tape(graph)
    dtype = inputs[past_name(0, "decoder", "key")].dtype
    source = states if dtype == ir.DataType.FLOAT else tape.op("Cast", [states], {"to": dtype})
    heads = _constant(graph, "heads", [0, 0, size.num_heads, size.head_size])
    zero, tokens = _constant(graph, "zero", [0]), _constant(graph, "tokens", [2])
    logits, *own_outputs = graph.outputs
    outputs = [logits]
    for layer, pair in enumerate(projections):
        outputs += own_outputs[2 * layer : 2 * layer + 2]
        for kind, projection in zip(KINDS, pair, strict=True):
            weight = _weight(graph, inputs, projection.weight, weights, held)
            product = tape.op("MatMul", [source, tape.op("Transpose", [weight], {"perm": [1, 0]})])
            if projection.bias is not None:
                product = tape.op("Add", [product, _weight(graph, inputs, projection.bias, weights, held)])
            split = tape.op("Transpose", [tape.op("Reshape", [product, heads])], {"perm": _HEADS_FIRST})
            given = inputs[past_name(layer, "encoder", kind)]
            split.shape, split.type = given.shape, given.type
            split.name = present_name(layer, "encoder", kind)
            given.replace_all_uses_with(split)
            own = inputs[past_name(layer, "decoder", kind)]
            # No tokens of keys and values that are there have the shape of no tokens before.
            own.replace_all_uses_with(tape.op("Slice", [split, zero, zero, tokens]))
            graph.inputs.remove(given)
            graph.inputs.remove(own)
            outputs.append(split)
            for node in tape.nodes:
                node.metadata_props.setdefault(MODULE_KEY, projection.module)
    made = list(tape.nodes)
    for node in made:
        graph.remove(node)
    graph.insert_before(graph[0], made)
    graph.inputs.append(states)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    for value in (*graph.outputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = value.shape.evaluate({PAST_LENGTH: 0})
    attach_weights(graph, held)
    name_nodes(decoder)
    graph.name = "first-step"
    return decoder


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    return add_constant(graph, f"first_step.{name}", np.array(numbers, np.int64))


def _weight(
    graph: ir.Graph,
    inputs: Mapping[str, ir.Value],
    name: str,
    weights: Mapping[str, ir.TensorProtocol],
    held: dict[str, ir.TensorProtocol],
) -> ir.Value:
    """A detached weight, which `attach_weights` turns into external data."""
    there = inputs.get(name)
    if there is None:
        tensor = weights[name]
        there = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype))
        graph.inputs.append(there)
    held[name] = weights[name]
    return there
