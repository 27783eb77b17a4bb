"""What a compression plugin is made of: its configuration, its tensors, and how a graph takes them.

Needs numpy alone: what traces, binds and runs models needs no validation of files (`plugin_file`).

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
    """A tensor of a plugin's layer, in the symbols k (ratio), d (hidden size) and m (bottleneck size).

    Attributes:
        file: Its shape in `plugin.safetensors`; a product is written `k*d`.
        graph: Its shape in a graph, behind the layers. A graph dimension k*d could not be told from k and d,
            so the two stand apart there.
    """

    file: tuple[str, ...]
    graph: tuple[str, ...]


# The tensors of a layer, in the order in which an any-ratio graph takes them.
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
# How pydantic reads the two classes below from a file.
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
    # None: only initialised. Otherwise what it was trained on and the loss reached.
    training: dict[str, Any] | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The numbers for the symbols of `TensorLayout`."""
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
        tensors: numpy arrays by the names of the file.
    """

    config: PluginConfig
    tensors: Mapping[str, np.ndarray]


def tensor_name(layer: int, kind: str) -> str:
    """The name of one tensor in `plugin.safetensors`."""
    return f"layers.{layer}.{kind}"


def size_of(dimension: str, sizes: Mapping[str, int]) -> int:
    """A dimension of `TensorLayout` in numbers."""
    return math.prod(sizes[factor] if factor in sizes else int(factor) for factor in dimension.split("*"))


def layer_shapes(config: PluginConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a layer in the file."""
    sizes = config.sizes
    return {
        kind: tuple(size_of(dimension, sizes) for dimension in layout.file)
        for kind, layout in PLUGIN_TENSORS.items()
    }


def graph_shapes(config: PluginConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor as a graph takes it, stacked over the layers."""
    sizes = config.sizes
    return {
        kind: (config.num_layers, *(size_of(dimension, sizes) for dimension in layout.graph))
        for kind, layout in PLUGIN_TENSORS.items()
    }


def expected_shapes(config: PluginConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the file."""
    shapes = layer_shapes(config)
    return {tensor_name(i, kind): shape for i in range(config.num_layers) for kind, shape in shapes.items()}


def plugin_input_shapes(config: PluginConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of an any-ratio graph's inputs that differ from plugin to plugin, by the inputs' names."""
    return {
        GRAPH_INPUT_PREFIX + kind: shape
        for kind, shape in graph_shapes(config).items()
        if {"k", "m"} & {*PLUGIN_TENSORS[kind].graph}
    }


def stack_for_graph(plugin: Plugin) -> dict[str, np.ndarray]:
    """The inputs of an any-ratio graph that carry this plugin: each kind stacked over the layers, float32."""
    config = plugin.config
    inputs: dict[str, np.ndarray] = {}
    for kind, shape in graph_shapes(config).items():
        stacked = np.stack([plugin.tensors[tensor_name(i, kind)] for i in range(config.num_layers)])
        inputs[GRAPH_INPUT_PREFIX + kind] = stacked.reshape(shape).astype(np.float32)
    inputs[EXCLUDE_PADDING_INPUT] = np.array(config.masking == "exclude-padding")
    return inputs


def null_plugin(num_layers: int, hidden_size: int) -> Plugin:
    """The plugin of ratio 1 that changes nothing.

    A window of one vector has the weight softmax(0) = 1, and a zero `up` adds nothing to the output of
    the feed-forward network, so an any-ratio graph computes the backbone itself.
    """
    config = PluginConfig(ratio=1, hidden_size=hidden_size, bottleneck_size=1, num_layers=num_layers)
    shapes = expected_shapes(config)
    return Plugin(config, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
