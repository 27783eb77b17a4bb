"""Passes that simplify a graph without changing its results."""

import numpy as np
import onnx_ir as ir
from onnxscript import optimizer

# Not in the public namespace of onnxscript 0.6 and 0.7; pyproject.toml allows no other version.
from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization

from variator_export.graph.constants import add_constant

MODULE_KEY = "variator.module"
_RMS_NORMALIZATION_OPSET = 23
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
# What torch.fx writes where an operation has no module.
_NO_MODULE = "_empty_nn_module_stack"


def name_modules(model: ir.Model, prefix: str) -> None:
    """Replace the exporter's metadata by the PyTorch module that each node came from.

    The exporter embeds the paths of source files, which would make the graph's bytes depend on the folder.

    Args:
        model: The model, changed in place.
        prefix: The path of the backbone inside the traced module, with a dot at the end.
    """
    for node in model.graph:
        scopes = node.metadata_props.get(_SCOPES_KEY)
        # The list holds the enclosing modules, outermost first, and then the operation itself.
        names = [part.strip().strip("'") for part in scopes.strip("[]").split(",")] if scopes else []
        node.metadata_props.clear()
        node.doc_string = None
        module = names[-2].removeprefix(prefix) if len(names) >= 2 else ""
        if module and not module.startswith(_NO_MODULE):
            node.metadata_props[MODULE_KEY] = module
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        for output in node.outputs:
            output.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None


def simplify(model: ir.Model, *, fuse_norms: bool) -> None:
    """Fold constants, drop unused nodes, and make the targets of reshapes constant where shapes allow.

    Args:
        model: The model, changed in place.
        fuse_norms: Whether to fuse T5's layer norm from seven operators into one (`RMSNormalization`), if the
            opset has it, which takes less than half the time with ONNX Runtime's CPU kernels. Not for half
            precision, where the layer norm normalizes float32 vectors but multiplies float16 ones. The
            operator's types do not allow that.
    """
    with np.errstate(
        all="ignore"
    ):  # T5 computes the logarithm of 0 for distances that it then treats otherwise
        optimizer.optimize_ir(model)
        _constant_reshapes(model)
        optimizer.optimize_ir(model)
    if fuse_norms and (model.opset_imports.get("") or 0) >= _RMS_NORMALIZATION_OPSET:
        fuse_rms_normalization(model)
    for node in model.graph:
        module = node.metadata_props.get(MODULE_KEY)
        node.metadata_props.clear()
        if module:
            node.metadata_props[MODULE_KEY] = module


def remove_unused(graph: ir.Graph) -> None:
    """Remove the nodes whose results nothing reads, and the constants that nothing reads."""
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_input():
            del graph.initializers[name]


def name_nodes(model: ir.Model) -> None:
    """Name every node MODULE/OPERATOR_N, so that messages of runtimes and builders show the module."""
    counts: dict[str, int] = {}
    for node in model.graph:
        stem = f"{module_of(node)}/{node.op_type}"
        counts[stem] = counts.get(stem, 0) + 1
        node.name = f"{stem}_{counts[stem]}"


def module_of(node: ir.Node) -> str:
    """The PyTorch module that a node came from; empty if there is none."""
    return node.metadata_props.get(MODULE_KEY, "")


def _constant_reshapes(model: ir.Model) -> None:
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Reshape":
            continue
        # With allowzero=1 a runtime refuses 0 and -1 in one target; no dimension here can be 0.
        node.attributes.pop("allowzero", None)
        source, target = node.inputs[0], node.inputs[1]
        if source is None or target is None or target.const_value is not None:
            continue
        constant = reshape_target(source.shape, node.outputs[0].shape)
        if constant is None:
            continue
        name = f"{node.outputs[0].name}.shape"
        node.replace_input_with(1, add_constant(graph, name, np.array(constant, np.int64)))


def reshape_target(source: ir.Shape | None, result: ir.Shape | None) -> list[int] | None:
    """Compute a constant reshape target: numbers, 0 for a copied dimension, and -1 for an inferred one.

    Returns:
        The target; None if a shape is unknown or more than one dimension would be -1.
    """
    if source is None or result is None:
        return None
    target: list[int] = []
    for position, dim in enumerate(result):
        if isinstance(dim, int):
            target.append(dim)
        elif dim.value is None:
            target.append(-1)
        elif position < len(source) and source[position] == dim:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None
