"""The trace of the part with plugins: their tensors are inputs, and the ratio is symbolic."""

import onnx_ir as ir
import torch
from torch import Tensor, nn

from variator_export.core.axes import BATCH, is_key_or_value
from variator_export.graph.export import Traced, detach_parameters, export
from variator_export.graph.padding import add_window_padding
from variator_export.graph.simplify import name_modules
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
        # Keys and values stay in the type of the weights, because a decoder reads them for every token.
        return tuple(value if is_key_or_value(name) else value.float() for name, value in outputs.items())


def trace_encoder(backbone: Backbone, opset: int) -> Traced:
    """Trace the any-ratio graph.

    Args:
        backbone: The loaded backbone; left unchanged.
        opset: ONNX opset of the graph.

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
    used = detach_parameters(graph, traced, backbone)
    add_window_padding(graph, backbone.spec.family.inputs, backbone.info.token_outputs, backbone.pad_token_id)
    graph.name = "any-ratio"
    return Traced(model, used, stack_for_graph(null_plugin(size.num_layers, size.hidden_size)))


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
    dynamic_shapes = {
        "inputs": {name: {0: batch, 1: windows, 2: ratio} for name in inputs},
        "exclude_padding": {},
        "stacked": {
            # Dimension 0 counts the layers.
            kind: {i: symbols[dim] for i, dim in enumerate(layout.graph, start=1) if dim in symbols}
            for kind, layout in PLUGIN_TENSORS.items()
        },
    }
    names = [*inputs, EXCLUDE_PADDING_INPUT, *(GRAPH_INPUT_PREFIX + kind for kind in stacked)]
    arguments = {"inputs": inputs, "exclude_padding": exclude_padding, "stacked": stacked}
    return export(traced, arguments, dynamic_shapes, (names, backbone.info.outputs), opset)
