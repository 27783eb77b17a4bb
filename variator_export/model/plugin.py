"""The Variator compression plugin as PyTorch modules.

All formulas come from arXiv 2310.15724 §3 and its released code (thunlp/Compression-Plugin at b1216c0,
`variator/model/muxT5.py` and `AdapterLayer.py`).

Shapes: B batch, W windows, k ratio, N = W*k tokens, d hidden size, m bottleneck size.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from variator_export.model.plugin_layout import BackboneIdentity, Masking, Plugin, PluginConfig, Start

DEFAULT_BOTTLENECK_SIZE = 64


class CompressionLayer(nn.Module):
    """Replaces k neighbouring vectors by their weighted sum; the weights are a softmax over k scores."""

    def __init__(self, ratio: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ratio, ratio * hidden_size))
        self.bias = nn.Parameter(torch.zeros(ratio))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Compress windows.

        Args:
            x: Hidden vectors, (B, W, k, d), finite.
            keep: bool (B, W, k), False for vectors to exclude. A window whose vectors are all excluded
                becomes zeros. None includes every vector.

        Returns:
            One vector per window, (B, W, d).
        """
        if keep is not None:
            # Multiply, because selecting (Where) at this size costs four times as much in a graph.
            x = x * keep.unsqueeze(-1).to(x.dtype)
        scores = nn.functional.linear(x.flatten(2), self.weight, self.bias)  # (B, W, k)
        if keep is not None:
            lowest = torch.full((), torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
            scores = torch.where(keep, scores, lowest)
        weights = torch.softmax(scores, dim=-1)
        return (x * weights.unsqueeze(-1)).sum(-2)  # TensorRT fuses it with the softmax, unlike a product


class DecompressionLayer(nn.Module):
    """Repeats each output of the feed-forward network k times and adapts each copy to its own token.

    `out = y + up(tanh(down(concat(y, x))))`, where y is the repeated output and x the hidden vectors before
    compression.
    """

    def __init__(self, hidden_size: int, bottleneck_size: int) -> None:
        super().__init__()
        self.down = nn.Linear(2 * hidden_size, bottleneck_size)
        self.up = nn.Linear(bottleneck_size, hidden_size)

    def forward(self, y: Tensor, x: Tensor, *, split: bool = False) -> Tensor:
        """Decompress windows.

        Args:
            y: Outputs of the feed-forward network, (B, W, d). In a float16 backbone the last layer of the
                network may be in float32, because its values exceed float16 (T5). They are then read in
                float32 too, and the result is float32, as without a plugin.
            x: Inputs of the network before compression, (B, W, k, d).
            split: Whether to compute the same result with fewer operations: the half of `down` that acts on
                y, and both biases, are computed once per window instead of once per token.

        Returns:
            One vector per token, (B, W, k, d).
        """
        wide = torch.promote_types(x.dtype, y.dtype)
        if split or wide != x.dtype:
            return self._forward_split(y, x, wide)
        repeated = y.unsqueeze(-2).expand_as(x)  # (B, W, k, d)
        both = torch.cat([repeated.to(x.dtype), x], dim=-1)
        return repeated + self.up(torch.tanh(self.down(both)))

    def _forward_split(self, y: Tensor, x: Tensor, wide: torch.dtype) -> Tensor:
        linear = nn.functional.linear
        hidden_size = y.shape[-1]
        weight_y, weight_x = self.down.weight[:, :hidden_size], self.down.weight[:, hidden_size:]
        # What exceeds float16 becomes infinite here at the earliest, where the tanh makes it 1.
        once = linear(y.to(wide), weight_y.to(wide), self.down.bias.to(wide)).to(x.dtype)  # (B, W, m)
        down = once.unsqueeze(-2) + linear(x, weight_x)  # (B, W, k, m)
        return (y + self.up.bias).unsqueeze(-2) + linear(torch.tanh(down), self.up.weight)


class LayerPlugin(nn.Module):
    """The part of a plugin that belongs to one encoder layer."""

    def __init__(self, ratio: int, hidden_size: int, bottleneck_size: int) -> None:
        super().__init__()
        self.compress = CompressionLayer(ratio, hidden_size)
        self.decompress = DecompressionLayer(hidden_size, bottleneck_size)


class CompressionPlugin(nn.Module):
    """A whole plugin. Its state dict has the names and shapes of `plugin.safetensors`."""

    def __init__(self, config: PluginConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            LayerPlugin(config.ratio, config.hidden_size, config.bottleneck_size)
            for _ in range(config.num_layers)
        )

    def layer_plugins(self) -> list[LayerPlugin]:
        """The plugins of the layers, in order."""
        return [layer for layer in self.layers if isinstance(layer, LayerPlugin)]

    def of_layers(self, layers: Sequence[int]) -> "CompressionPlugin":
        """The plugin for a stack of some of the backbone's layers; parameters are shared."""
        part = CompressionPlugin(dataclasses.replace(self.config, num_layers=len(layers)))
        part.layers = nn.ModuleList(self.layers[layer] for layer in layers)
        return part.eval()

    @classmethod
    def from_file(cls, plugin: Plugin) -> "CompressionPlugin":
        """Build the modules, in float32, of a plugin that was read from its files."""
        module = cls(plugin.config)
        state = {name: torch.from_numpy(np.array(t, np.float32)) for name, t in plugin.tensors.items()}
        module.load_state_dict(state)
        return module.eval().requires_grad_(False)

    def initialise(self, seed: int, start: Start = "paper") -> "CompressionPlugin":
        """Set every parameter to its initial value for training; biases are 0.

        Args:
            seed: Seed of the random numbers.
            start: Initial values of the weights. `paper`: normal weights with standard deviation
                sqrt(2/(d*k)) in the compression layer and 0.01 in `down` and `up`. `teacher`: closer to the
                model without plugins. A window becomes the mean of its vectors (zero scores), `up` is 0, and
                `down` has standard deviation 1/sqrt(2d), so that its outputs have the scale of its inputs.
        """
        generator = torch.Generator().manual_seed(seed)
        d, k = self.config.hidden_size, self.config.ratio
        paper = {"compress": math.sqrt(2.0 / (d * k)), "down": 0.01, "up": 0.01}
        teacher = {"compress": 0.0, "down": math.sqrt(1.0 / (2 * d)), "up": 0.0}
        stds = paper if start == "paper" else teacher
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                *_, part, kind = name.split(".")
                std = 0.0 if kind == "bias" else stds[part]
                parameter.normal_(0.0, std, generator=generator) if std else parameter.zero_()
        return self

    def to_file(self) -> Plugin:
        """Convert the modules to the plugin that is written to files."""
        return Plugin(self.config, {name: t.detach().cpu().numpy() for name, t in self.state_dict().items()})


def initialise_plugin(
    ratio: int,
    hidden_size: int,
    num_layers: int,
    *,
    bottleneck_size: int = DEFAULT_BOTTLENECK_SIZE,
    masking: Masking = "none",
    seed: int = 0,
    backbone: BackboneIdentity | None = None,
) -> Plugin:
    """An untrained plugin with the paper's initialisation."""
    config = PluginConfig(
        ratio=ratio,
        hidden_size=hidden_size,
        bottleneck_size=bottleneck_size,
        num_layers=num_layers,
        masking=masking,
        backbone=backbone,
    )
    return CompressionPlugin(config).initialise(seed).to_file()


def graph_state(stacked: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Select one layer's tensors, named as in `LayerPlugin`, from tensors stacked over the layers.

    The stacked weight of the compression layer is (L, k, k, d); the selected weight is (k, k*d).
    """
    state = {name: tensor[layer] for name, tensor in stacked.items()}
    state["compress.weight"] = state["compress.weight"].flatten(1)
    return state
