"""The contents of a compression plugin: its configuration, its tensors, and their layout as graph inputs.

This module needs only numpy, because code that traces, binds and runs models does not validate files. That is
the task of `plugin_file`.

Shapes: L layers, k ratio, d hidden size, m bottleneck size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

CONFIG_NAME = "plugin_config.json"
TENSORS_NAME = "plugin.safetensors"

Masking = Literal["none", "exclude-padding"]
Start = Literal["paper", "teacher"]


@dataclass(frozen=True)
class TensorLayout:
    """Shapes of a tensor of a plugin layer, in the symbols k (ratio), d (hidden size), m (bottleneck size).

    Attributes:
        file: Shape in `plugin.safetensors`; a product is written `k*d`.
        graph: Shape in a graph, after the dimension of the layers. k and d could not be recovered from a
            single graph dimension k*d, so they are separate dimensions there.
    """

    file: tuple[str, ...]
    graph: tuple[str, ...]


# The tensors of a layer, in the order of an any-ratio graph's inputs.
PLUGIN_TENSORS = {
    "compress.weight": TensorLayout(("k", "k*d"), ("k", "k", "d")),
    "compress.bias": TensorLayout(("k",), ("k",)),
    "decompress.down.weight": TensorLayout(("m", "2*d"), ("m", "2*d")),
    "decompress.down.bias": TensorLayout(("m",), ("m",)),
    "decompress.up.weight": TensorLayout(("d", "m"), ("d", "m")),
    "decompress.up.bias": TensorLayout(("d",), ("d",)),
}
GRAPH_INPUT_PREFIX = "plugin."
EXCLUDE_PADDING_INPUT = "plugin.exclude_padding"
# Configuration with which pydantic reads the two classes below from a file.
_NOTHING_ELSE = {"extra": "forbid"}


@dataclass(frozen=True)
class BackboneIdentity:
    """The backbone that a plugin was made for."""

    __pydantic_config__ = _NOTHING_ELSE

    model_type: str
    name: str | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class PluginConfig:
    """The content of `plugin_config.json`.

    Raises:
        ValueError: A size is below 1.
    """

    __pydantic_config__ = _NOTHING_ELSE

    format_version: Literal[1] = 1
    ratio: int
    hidden_size: int
    bottleneck_size: int
    num_layers: int
    activation: Literal["tanh"] = "tanh"
    masking: Masking = "none"
    backbone: BackboneIdentity | None = None
    # None if the plugin is only initialised. Otherwise a record of its training: data, settings and loss.
    training: dict[str, Any] | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers for the symbols of `TensorLayout`."""
        return {"k": self.ratio, "d": self.hidden_size, "m": self.bottleneck_size}

    def __post_init__(self) -> None:
        for name in ("ratio", "hidden_size", "bottleneck_size", "num_layers"):
            if (found := getattr(self, name)) < 1:
                raise ValueError(f"{name!r} is {found}: it has to be at least 1")


@dataclass(frozen=True)
class Plugin:
    """A compression plugin in memory.

    Attributes:
        config: The content of `plugin_config.json`.
        tensors: numpy arrays by their names in `plugin.safetensors`.
    """

    config: PluginConfig
    tensors: Mapping[str, np.ndarray]


def tensor_name(layer: int, kind: str) -> str:
    """Name of one tensor in `plugin.safetensors`."""
    return f"layers.{layer}.{kind}"


def size_of(dimension: str, sizes: Mapping[str, int]) -> int:
    """Evaluate a dimension of `TensorLayout`."""
    return math.prod(sizes[factor] if factor in sizes else int(factor) for factor in dimension.split("*"))


def layer_shapes(config: PluginConfig) -> dict[str, tuple[int, ...]]:
    """Shape in the file of each tensor of a layer."""
    sizes = config.sizes
    return {
        kind: tuple(size_of(dimension, sizes) for dimension in layout.file)
        for kind, layout in PLUGIN_TENSORS.items()
    }


def graph_shapes(config: PluginConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor as a graph input, stacked over the layers."""
    sizes = config.sizes
    return {
        kind: (config.num_layers, *(size_of(dimension, sizes) for dimension in layout.graph))
        for kind, layout in PLUGIN_TENSORS.items()
    }


def expected_shapes(config: PluginConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the file."""
    shapes = layer_shapes(config)
    return {tensor_name(i, kind): shape for i in range(config.num_layers) for kind, shape in shapes.items()}


def plugin_input_shapes(config: PluginConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of those inputs of an any-ratio graph whose shape depends on the plugin, by input name."""
    return {
        GRAPH_INPUT_PREFIX + kind: shape
        for kind, shape in graph_shapes(config).items()
        if {"k", "m"} & {*PLUGIN_TENSORS[kind].graph}
    }


def stack_for_graph(plugin: Plugin) -> dict[str, np.ndarray]:
    """Build the plugin inputs of an any-ratio graph: each kind stacked over the layers, all in float32."""
    config = plugin.config
    inputs: dict[str, np.ndarray] = {}
    for kind, shape in graph_shapes(config).items():
        stacked = np.stack([plugin.tensors[tensor_name(i, kind)] for i in range(config.num_layers)])
        inputs[GRAPH_INPUT_PREFIX + kind] = stacked.reshape(shape).astype(np.float32)
    inputs[EXCLUDE_PADDING_INPUT] = np.array([config.masking == "exclude-padding"], np.float32)
    return inputs


def null_plugin(num_layers: int, hidden_size: int) -> Plugin:
    """Create the plugin of ratio 1 that changes nothing.

    The only vector of a window has the weight softmax(0) = 1, and a zero `up` adds nothing to the output of
    the feed-forward network. With this plugin an any-ratio graph therefore computes the backbone itself.
    """
    config = PluginConfig(ratio=1, hidden_size=hidden_size, bottleneck_size=1, num_layers=num_layers)
    shapes = expected_shapes(config)
    return Plugin(config, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
