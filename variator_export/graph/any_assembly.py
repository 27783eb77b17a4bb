"""One graph for all assemblies: every layer and every module is a branch that an input switches on or off.

The branches stand in the order of the layers that they begin with. So the branches of an assembly, which
overlap nowhere, follow each other, and all others pass their input on. Each weight is in the graph once.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from variator_export.bundle.branches import BRANCHES_INPUT
from variator_export.core.assembly import Span
from variator_export.graph.assemble import KeptLayer, layer_states, module_values, nodes_by_layer
from variator_export.graph.defaults import set_defaults
from variator_export.graph.simplify import MODULE_KEY, name_nodes
from variator_export.graph.weights import attach_weights, detach_weights


def any_assembly(
    any_ratio: Path, path: str, branches: Sequence[KeptLayer], spans: Sequence[Span], hidden_size: int
) -> ir.Model:
    """Build the graph.

    Args:
        any_ratio: The graph of the original layers that takes plugins as inputs, in the bundle's folder.
        path: Name of the PyTorch module that holds the layers, inside transformers' base model.
        branches: The original layers and the modules, in the order of the layers that they begin with.
        spans: The original layers that each branch stands for. Those that are one are on by default.
        hidden_size: Width of the vectors between two layers.

    Returns:
        The graph, with the input `assembly.branches` besides those of the given graph.
    """
    model = ir.load(any_ratio)
    graph = model.graph
    held: dict[str, ir.TensorProtocol] = dict(detach_weights(graph))
    nodes = nodes_by_layer(graph, path)
    states = layer_states(nodes, hidden_size)
    layers = {index: _hoist(graph, nodes[index], states, index) for index in sorted(nodes)}
    switches = ir.Value(
        name=BRANCHES_INPUT, shape=ir.Shape([len(branches)]), type=ir.TensorType(ir.DataType.BOOL)
    )
    graph.inputs.append(switches)
    after = nodes[len(nodes) - 1][-1]
    made: list[ir.Node] = []
    state = states[0]
    for place, branch in enumerate(branches):
        nodes_of_branch = layers[branch.index]
        read = dict.fromkeys(value for node in nodes_of_branch for value in node.inputs if value is not None)
        weights, own = module_values(graph, read, f"{path}.{branch.index}", branch.weights or {})
        held |= own
        stored = {value for value in graph.inputs if value.name in held}
        run, outside = _branch(
            nodes_of_branch,
            {**weights, states[branch.index]: state},
            states[branch.index + 1],
            stored,
            f"branch{place}/",
        )
        which = ir.node("Constant", [], {"value": ir.tensor([place], dtype=ir.DataType.INT64)})
        switch = ir.node("Gather", [switches, which.outputs[0]], {"axis": 0})
        choice = ir.node(
            "If", [switch.outputs[0]], {"then_branch": run, "else_branch": _pass_on(state, place)}
        )
        state = choice.outputs[0]
        choice.metadata_props[MODULE_KEY] = f"{path}.{spans[place]}"
        state.shape, state.type, state.name = states[0].shape, states[0].type, f"{BRANCHES_INPUT}.{place}"
        made += [*outside, which, switch, choice]
    last = states[len(nodes)]
    graph.insert_after(after, made)
    last.replace_all_uses_with(state)
    for index in sorted(nodes, reverse=True):
        for node in reversed(nodes[index]):
            graph.remove(node, safe=True)
    attach_weights(graph, held)
    set_defaults(graph, {BRANCHES_INPUT: np.array([span.granularity == 1 for span in spans])})
    name_nodes(model)
    graph.name = "any-assembly"
    return model


def _hoist(graph: ir.Graph, nodes: list[ir.Node], states: Sequence[ir.Value], layer: int) -> list[ir.Node]:
    """Compute outside of a layer what other layers read besides its vectors, such as the mask.

    It may ask for the shape of the vectors before the layer, which all vectors have.

    Returns:
        The nodes that make the layer's vectors.
    """
    inside = set(nodes)
    outer_uses = {
        output: [use for use in output.uses() if use.node not in inside]
        for node in nodes
        for output in node.outputs
        if output is not states[layer + 1]
    }
    shared = _leading_to({output for output, uses in outer_uses.items() if uses}, nodes)
    if shared:
        copies, values = _copied(shared, {states[layer]: states[0]}, "shared/")
        graph.insert_before(nodes[0], copies)
        for output, uses in outer_uses.items():
            for use in uses:
                use.node.replace_input_with(use.idx, values[output])
    return _leading_to({states[layer + 1]}, nodes)


def _leading_to(values: Collection[ir.Value], nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """The nodes of a layer that some of its values are computed by, in order."""
    needed = {value.producer() for value in values}
    for node in reversed(nodes):
        if node in needed:
            needed |= {value.producer() for value in node.inputs if value is not None}
    return [node for node in nodes if node in needed]


def _copied(
    nodes: Sequence[ir.Node], given: Mapping[ir.Value, ir.Value], prefix: str
) -> tuple[list[ir.Node], dict[ir.Value | None, ir.Value | None]]:
    """Copies of nodes.

    Args:
        nodes: The nodes, in order.
        given: Values that the copies read instead of those that the nodes read.
        prefix: Prefix of the names of copies and of their results.

    Returns:
        The copies, and the values that stand for those of the nodes.
    """
    values: dict[ir.Value | None, ir.Value | None] = dict(given.items())
    copies = []
    for node in nodes:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [values.get(value, value) for value in node.inputs],
            list(node.attributes.values()),
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
            name=f"{prefix}{node.name}",
            metadata_props=dict(node.metadata_props),
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.shape, new.type = f"{prefix}{old.name}", old.shape, old.type
            values[old] = new
        copies.append(copy)
    return copies, values


def _branch(
    nodes: Sequence[ir.Node],
    given: Mapping[ir.Value, ir.Value],
    output: ir.Value,
    stored: Collection[ir.Value],
    prefix: str,
) -> tuple[ir.Graph, list[ir.Node]]:
    """A copy of a layer as a branch.

    Args:
        nodes: The layer's nodes.
        given: Values that the copy reads instead of those that the nodes read.
        output: The layer's result.
        stored: Weights.
        prefix: Prefix of the names in the copy.

    Returns:
        The branch, and the nodes that depend on weights alone. They stay outside, because ONNX Runtime
        computes them there once, when it opens the graph, and frees the weights: inside, it would keep both.
    """
    copies, values = _copied(nodes, given, prefix)
    fixed, outside = set(stored), []
    for copy in copies:
        read = [value for value in copy.inputs if value is not None]
        if read and all(value in fixed for value in read):
            fixed |= set(copy.outputs)
            outside.append(copy)
    inside = [copy for copy in copies if copy not in set(outside)]
    result = values[output]
    assert result is not None
    return ir.Graph([], [result], nodes=inside, name=prefix), outside


def _pass_on(state: ir.Value, place: int) -> ir.Graph:
    """The branch that changes nothing."""
    same = ir.node("Identity", [state])
    same.outputs[0].shape, same.outputs[0].type = state.shape, state.type
    same.outputs[0].name = f"passed{place}"
    return ir.Graph([], [same.outputs[0]], nodes=[same], name=f"pass{place}")
