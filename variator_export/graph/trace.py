"""Tracing: exporting the backbone once, with the plugin's tensors as inputs and a symbolic ratio."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from variator_export.core.axes import BATCH
from variator_export.graph.attention import fuse_attention
from variator_export.graph.defaults import set_defaults
from variator_export.graph.padding import add_window_padding
from variator_export.graph.simplify import name_modules, name_nodes, simplify
from variator_export.graph.weights import attach_weights, detach, external_tensors, write_weights
from variator_export.model.augmented import CompressedFeedForward, WindowedModel
from variator_export.model.backbone import Backbone
from variator_export.model.plugin import CompressionPlugin, graph_state
from variator_export.model.plugin_layout import (
    EXCLUDE_PADDING_INPUT,
    GRAPH_INPUT_PREFIX,
    PLUGIN_TENSORS,
    PluginConfig,
    graph_shapes,
    null_plugin,
    stack_for_graph,
)

# The first opset with Attention. ONNX Runtime 1.23 and TensorRT for RTX 1.7 support it.
ATTENTION_OPSET = 23
# A constant of the trace, such as a table of positions, may be stored in the graph. A weight may not.
_MAX_INLINE_BYTES = 64 * 1024
# No size of the example may be 1 or equal to another size: the exporter could treat it as a constant.
_EXAMPLE_BATCH, _EXAMPLE_WINDOWS, _EXAMPLE_RATIO, _EXAMPLE_BOTTLENECK = 2, 5, 3, 7


class _TracedModel(nn.Module):
    """`WindowedModel` as a function of its inputs and of the plugin's tensors, stacked over the layers.

    The plugin's tensors and the outputs are float32 in every precision. One plugin file therefore serves all
    precisions, and a caller need not know the precision of a graph.
    """

    def __init__(self, windowed: WindowedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.windowed = windowed
        self.dtype = dtype
        sites = [
            name for name, module in windowed.named_modules() if isinstance(module, CompressedFeedForward)
        ]
        self.plugin_paths = [f"{name}.plugin." for name in sites]

    def forward(
        self, inputs: dict[str, Tensor], exclude_padding: Tensor, stacked: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        state = {
            path + name: tensor.to(self.dtype)
            for layer, path in enumerate(self.plugin_paths)
            for name, tensor in graph_state(stacked, layer).items()
        }
        # A float vector of one, because ONNX Runtime's adapters hold neither bool nor scalars.
        outputs = torch.func.functional_call(self.windowed, state, (inputs, exclude_padding > 0))
        return tuple(value.float() for value in outputs.values())


def trace(backbone: Backbone, folder: Path, weights_name: str, opset: int = ATTENTION_OPSET) -> ir.Model:
    """Trace the any-ratio graph and write the weights that it uses.

    Args:
        backbone: The loaded backbone; left unchanged.
        folder: Folder for the weights file.
        weights_name: Name of the weights file.
        opset: ONNX opset of the graph. Below 23, attention is matrix products and a softmax.

    Returns:
        A graph with the backbone's inputs, (batch_size, sequence_length), the plugin's inputs
        (`plugin_layout.stack_for_graph`) with the null plugin as default values, and the backbone's outputs.
    """
    size = backbone.info.size
    config = PluginConfig(
        ratio=_EXAMPLE_RATIO,
        hidden_size=size.hidden_size,
        bottleneck_size=_EXAMPLE_BOTTLENECK,
        num_layers=size.num_layers,
    )
    windowed = WindowedModel(backbone, CompressionPlugin(config).initialise(seed=0), split=True)
    traced = _TracedModel(windowed, backbone.dtype).eval().requires_grad_(False)
    model = _export(traced, backbone, config, opset)
    graph = model.graph
    name_modules(model, prefix="windowed.model.")
    used = _detach_parameters(graph, traced, backbone)
    add_window_padding(graph, backbone.spec.family.inputs, backbone.spec.token_outputs, backbone.pad_token_id)
    simplify(model, fuse_norms=backbone.dtype == torch.float32)
    if opset >= ATTENTION_OPSET:
        fuse_attention(model)
    _check_inline(graph)
    state = backbone.state
    write_weights({name: state[name] for name in used}, folder / weights_name)
    attach_weights(graph, external_tensors(folder, weights_name))
    set_defaults(graph, stack_for_graph(null_plugin(size.num_layers, size.hidden_size)))
    name_nodes(model)
    graph.name = "any-ratio"
    return model


def _example(backbone: Backbone, config: PluginConfig) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    shape = (_EXAMPLE_BATCH, _EXAMPLE_WINDOWS, config.ratio)
    inputs = {name: torch.ones(shape, dtype=torch.int64) for name in backbone.spec.family.inputs}
    stacked = {kind: torch.zeros(shape) for kind, shape in graph_shapes(config).items()}
    return inputs, torch.zeros(1), stacked


def _export(traced: _TracedModel, backbone: Backbone, config: PluginConfig, opset: int) -> ir.Model:
    batch, windows, ratio, bottleneck = (
        torch.export.Dim(name, min=1) for name in (BATCH, "windows", "ratio", "bottleneck_size")
    )
    inputs, exclude_padding, stacked = _example(backbone, config)
    symbols = {"k": ratio, "m": bottleneck}
    dynamic_stacked = {
        # Dimension 0 counts the layers.
        kind: {i: symbols[dim] for i, dim in enumerate(layout.graph, start=1) if dim in symbols}
        for kind, layout in PLUGIN_TENSORS.items()
    }
    dynamic_shapes = {
        "inputs": {name: {0: batch, 1: windows, 2: ratio} for name in inputs},
        "exclude_padding": {},
        "stacked": dynamic_stacked,
    }
    with quiet_exporter():
        program = torch.onnx.export(
            traced,
            # Pass keywords, because a dict at the end of `args` would be interpreted as keywords anyway.
            kwargs={"inputs": inputs, "exclude_padding": exclude_padding, "stacked": stacked},
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=dynamic_shapes,
            input_names=[*inputs, EXCLUDE_PADDING_INPUT, *(GRAPH_INPUT_PREFIX + kind for kind in stacked)],
            output_names=list(backbone.info.outputs),
            # Without optimization, weights keep their names and layout. `simplify` runs later.
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


def _detach_parameters(graph: ir.Graph, traced: _TracedModel, backbone: Backbone) -> list[str]:
    """Rename every weight to its name in the backbone's state dict and detach it; returns the names."""
    # Tied weights have several names. Use the first one, regardless of the exporter's choice.
    parameters = list(backbone.model.named_parameters(remove_duplicate=False))
    named = {id(parameter): name for name, parameter in reversed(parameters)}
    named |= {id(buffer): name for name, buffer in backbone.model.named_buffers() if name in backbone.state}
    own: dict[str, Tensor] = {
        **dict(traced.named_parameters(remove_duplicate=False)),
        **dict(traced.named_buffers(remove_duplicate=False)),
    }
    names = []
    for value in list(graph.initializers.values()):
        tensor = own.get(str(value.name))
        if tensor is None or (name := named.get(id(tensor))) is None:
            continue
        del graph.initializers[str(value.name)]
        value.name = name
        graph.initializers[name] = value
        detach(graph, value)
        names.append(name)
    return names


def _check_inline(graph: ir.Graph) -> None:
    """Check that no weight is left in the graph under another name, because each is stored only once."""
    for name, value in graph.initializers.items():
        size = value.const_value.nbytes if value.const_value is not None else 0
        assert size <= _MAX_INLINE_BYTES, f"{name} ({size} bytes) is not a weight of the backbone"


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Suppress the output and warnings of torch.onnx, most of which concern its own future."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):  # noqa: PTH123
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
