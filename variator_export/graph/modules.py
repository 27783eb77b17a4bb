"""Locations of PyTorch modules in a graph, whose nodes each record the module that they came from."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from variator_export.graph.simplify import module_of

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def module_outputs(model: ir.Model) -> dict[str, str]:
    """Find the output value of each module, by module name.

    A module is left out if the optimization removed its nodes, if it has several outputs, or if its output is
    not floating-point. Values that do not depend on a weight are ignored: every layer computes the same mask,
    for example, and the optimization keeps only the one in the first layer.
    """
    leaving: dict[str, dict[str, None]] = {}
    outputs = {id(value) for value in model.graph.outputs}
    learned = {id(value) for value in model.graph.initializers.values() if _is_weight(value)}
    for node in model.graph:
        if any(id(value) in learned for value in node.inputs) or _has_branches(node):
            learned |= {id(value) for value in node.outputs}
        for value in node.outputs:
            if value.name is None or value.dtype not in (*_FLOATS, None) or id(value) not in learned:
                continue
            readers = [module_of(use.node) for use in value.uses()]
            for module in _with_parents(module_of(node)):
                if id(value) in outputs or any(not _is_within(reader, module) for reader in readers):
                    leaving.setdefault(module, {})[value.name] = None
    return {module: next(iter(values)) for module, values in leaving.items() if len(values) == 1}


def module_names(graph: Path) -> dict[str, str]:
    """Find the module of every node, by node name; empty for a node without a module."""
    return {node.name: module_of(node) for node in ir.load(graph).graph if node.name}


def mark_outputs(model: ir.Model, names: Iterable[str]) -> None:
    """Add values to the graph's outputs. A value that is the output of two modules is added once."""
    values = ir.convenience.create_value_mapping(model.graph)
    there = {value.name for value in model.graph.outputs}
    model.graph.outputs.extend(values[name] for name in dict.fromkeys(names) if name not in there)


def module_inputs(model: ir.Model, module: str) -> list[str]:
    """Find the values that a module reads from outside, except those computed from weights alone."""
    found: dict[str, None] = {}
    varying = {id(value) for value in model.graph.inputs}
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None and id(value) in varying]
        if inputs:
            varying |= {id(value) for value in node.outputs}
        if _is_within(module_of(node), module):
            for value in inputs:
                maker = value.producer()
                if value.name is not None and (maker is None or not _is_within(module_of(maker), module)):
                    found[value.name] = None
    return list(found)


def extract_module(model: ir.Model, module: str, inputs: Mapping[str, np.ndarray], output: str) -> ir.Model:
    """Build a graph of one module alone, with its weights stored in the graph.

    Args:
        model: The whole graph.
        module: Name of the module.
        inputs: The values that the module reads (`module_inputs`), as recorded in one run. Shapes among them
            become constants, because TensorRT treats shape inputs separately and requires them on the host.
        output: The module's output value.
    """
    graph = ir.convenience.extract(model.graph, list(inputs), [output])
    graph.name = module
    for value in list(graph.inputs):
        given = inputs[value.name or ""]
        if value.type is None:  # the optimization may have lost the type
            value.type = ir.TensorType(ir.DataType.from_numpy(given.dtype))
        if given.dtype == np.int64 and given.ndim < 2:
            graph.inputs.remove(value)
            value.const_value = ir.tensor(given, name=value.name)
            graph.register_initializer(value)
    extracted = ir.Model(graph, ir_version=model.ir_version)
    ir.external_data.load_to_model(extracted)
    return extracted


def _has_branches(node: ir.Node) -> bool:
    """Whether a node runs a layer as a branch, which reads its weights from outside."""
    return node.op_type == "If"


def _is_weight(value: ir.Value) -> bool:
    """Whether a value holds several floating-point numbers. A constant of a formula holds only one."""
    return value.dtype in _FLOATS and value.shape is not None and value.shape.numpy() not in ((), (1,))


def _is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _with_parents(module: str) -> list[str]:
    parts = module.split(".") if module else []
    return [".".join(parts[: index + 1]) for index in range(len(parts))]
