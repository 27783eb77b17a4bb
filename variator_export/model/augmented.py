"""A backbone with a compression plugin around every feed-forward network.

The backbone's `forward` stays unchanged. A wrapper module that holds the feed-forward network and the plugin
replaces each feed-forward network.

Shapes: B batch, S tokens before padding, W windows, k ratio, N = W*k tokens with padding, d hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from variator_export.bundle.variant_files import VariantFiles
from variator_export.core.axes import token_axis
from variator_export.model.backbone import Backbone, copy_sharing_weights
from variator_export.model.decoders.cross_attention import cross_states
from variator_export.model.decoders.label_words import label_word_scores
from variator_export.model.families.base import Architecture
from variator_export.model.plugin import CompressionPlugin, LayerPlugin
from variator_export.model.pooling import Pooling

HIDDEN_STATES_PREFIX = "hidden_states."
ATTENTIONS_PREFIX = "attentions."


@dataclass
class Windows:
    """State that all sites share during one call, because a site receives hidden vectors but no mask.

    Attributes:
        shape: (B, W, k).
        keep: bool (B, W, k), False for vectors excluded from the compression. None if every vector is
            included.
    """

    shape: tuple[int, int, int] = (0, 0, 0)
    keep: Tensor | None = None


class CompressedFeedForward(nn.Module):
    """A feed-forward network between the compression and the decompression layer of a plugin."""

    def __init__(
        self, ffn: nn.Module, plugin: LayerPlugin, windows: Windows, *, split: bool, fused: bool = False
    ) -> None:
        super().__init__()
        self.ffn = ffn
        self.plugin = plugin
        self.windows = windows
        self.split = split
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """Compress, run the feed-forward network and decompress: (B, N, d) to (B, N, d)."""
        batch, windows, ratio = self.windows.shape
        x = x.reshape(batch, windows, ratio, x.shape[-1])
        if self.fused:
            return self._fused(x).reshape(batch, windows * ratio, x.shape[-1])
        compressed = self.plugin.compress(x, self.windows.keep)
        out = self.plugin.decompress(self.ffn(compressed), x, split=self.split)
        return out.reshape(batch, windows * ratio, out.shape[-1])

    def _fused(self, x: Tensor) -> Tensor:
        from variator_export.kernels.operators import compress, decompress

        first, last = self.plugin.compress, self.plugin.decompress
        compressed, projected = compress(x, self.windows.keep, first.weight, first.bias, last.down.weight)
        return decompress(
            self.ffn(compressed),
            x,
            projected,
            last.down.weight,
            last.down.bias,
            last.up.weight,
            last.up.bias,
        )


class WindowedModel(nn.Module):
    """The augmented model for inputs already cut into windows. The exporter traces this class."""

    def __init__(
        self, backbone: Backbone, plugin: CompressionPlugin, *, split: bool = False, fused: bool = False
    ) -> None:
        super().__init__()
        self.spec = backbone.spec
        self.config = backbone.info.config
        self.windows = Windows()
        self.model = copy_sharing_weights(backbone.model)
        self.pooling = Pooling(backbone.pooling) if backbone.pooling else None
        layers = plugin.layer_plugins()

        def wrap(layer: int, ffn: nn.Module) -> nn.Module:
            return CompressedFeedForward(ffn, layers[layer], self.windows, split=split, fused=fused)

        family = self.spec.family
        family.wrap_ffns(self.model, wrap)
        if family.clamp_positions is not None:
            family.clamp_positions(self.model)
        self.eval()

    def forward(
        self,
        inputs: dict[str, Tensor],
        exclude_padding: Tensor | bool = False,
        *,
        hidden_states: bool = False,
    ) -> dict[str, Tensor]:
        """Run on windows.

        Args:
            inputs: int64 tensors (B, W, k), keyed by the backbone's input names.
            exclude_padding: Masking mode. A tensor keeps the mode a variable in a trace.
            hidden_states: Whether to return the hidden states of every layer as well (`run_backbone`).

        Returns:
            Outputs by name. Token outputs have N = W*k rows.
        """
        batch, windows, ratio = inputs["input_ids"].shape
        mask = inputs["attention_mask"]
        self.windows.shape = (batch, windows, ratio)
        if isinstance(exclude_padding, Tensor):
            self.windows.keep = torch.logical_or(mask > 0, torch.logical_not(exclude_padding))
        else:
            self.windows.keep = mask > 0 if exclude_padding else None
        flat = {name: value.reshape(batch, windows * ratio) for name, value in inputs.items()}
        positions = self._positions(flat)
        return run_backbone(self.model, self.spec, self.pooling, flat, positions, hidden_states=hidden_states)

    def _positions(self, flat: dict[str, Tensor]) -> dict[str, Tensor]:
        """Position ids for a family with absolute positions; empty for any other family."""
        make = self.spec.family.positions
        return {} if make is None else {"position_ids": make(flat["input_ids"], self.config)}


class AugmentedModel(nn.Module):
    """The augmented model as a user calls it: eager, in the paper's form, for any input length.

    The model pads its inputs itself, with the tokenizer's pad token. The embedding of that token mixes into
    the last window.

    Args:
        backbone: A loaded backbone. The model shares its weights and leaves its modules unchanged.
        plugin: A plugin for this backbone's hidden size and number of layers.
        fused: Whether to run the plugin by the two kernels of `variator_export.kernels`, on an NVIDIA GPU.
    """

    def __init__(self, backbone: Backbone, plugin: CompressionPlugin, *, fused: bool = False) -> None:
        super().__init__()
        self.windowed = WindowedModel(backbone, plugin, fused=fused)
        self.ratio = plugin.config.ratio
        self.exclude_padding = plugin.config.masking == "exclude-padding"
        self.pad_token_id = backbone.pad_token_id
        self.token_outputs = backbone.info.token_outputs
        self.module_buffers = backbone.module_buffers

    @property
    def transformer(self) -> nn.Module:
        """The underlying transformers model, with the plugin installed."""
        return self.windowed.model

    def forward(self, inputs: dict[str, Tensor], *, hidden_states: bool = False) -> dict[str, Tensor]:
        """Run on int64 inputs (B, S); returns outputs by name, with S rows in token outputs."""
        outputs = self.windowed(self.pad(inputs), self.exclude_padding, hidden_states=hidden_states)
        return self.unpad(outputs, inputs["input_ids"].shape[1])

    def pad(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pad int64 inputs (B, S) and cut them into windows, (B, W, k)."""
        batch, length = inputs["input_ids"].shape
        padding = -length % self.ratio
        windows = (length + padding) // self.ratio
        return {
            name: nn.functional.pad(
                value, (0, padding), value=self.pad_token_id if name == "input_ids" else 0
            ).reshape(batch, windows, self.ratio)
            for name, value in inputs.items()
        }

    def unpad(self, outputs: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        """Cut the rows of padding off the outputs of `windowed`."""
        return {
            name: value.narrow(token_axis(name), 0, length)
            if name in self.token_outputs or name.startswith(HIDDEN_STATES_PREFIX)
            else value
            for name, value in outputs.items()
        }


class PlainModel(nn.Module):
    """The backbone without plugins, with the same inputs and outputs as `AugmentedModel`."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.model = copy_sharing_weights(backbone.model)
        self.spec = backbone.spec
        self.pooling = Pooling(backbone.pooling) if backbone.pooling else None
        self.module_buffers = backbone.module_buffers

    @property
    def transformer(self) -> nn.Module:
        """The underlying transformers model."""
        return self.model

    def forward(self, inputs: dict[str, Tensor], *, hidden_states: bool = False) -> dict[str, Tensor]:
        """Run on int64 inputs (B, S); returns outputs by name."""
        return run_backbone(self.model, self.spec, self.pooling, inputs, {}, hidden_states=hidden_states)


def augmented_model(backbone: Backbone, files: VariantFiles) -> AugmentedModel:
    """The eager model of a variant with a compression plugin."""
    from variator_export.model.plugin_file import load_plugin  # imported late: it needs pydantic

    plugin = CompressionPlugin.from_file(load_plugin(files.plugin_folder))
    return AugmentedModel(backbone, plugin.to(backbone.dtype))


def plain_model(backbone: Backbone, _files: VariantFiles) -> PlainModel:
    """The eager model of the baseline, which has no files of its own."""
    return PlainModel(backbone)


def run_backbone(
    model: Any,
    spec: Architecture,
    pooling: Pooling | None,
    inputs: dict[str, Tensor],
    positions: dict[str, Tensor],
    *,
    hidden_states: bool = False,
    attentions: bool = False,
) -> dict[str, Tensor]:
    """Call the backbone and select its outputs; add `sentence_embedding` if the backbone declares a pooling.

    Of a model that generates text, the encoder is called, and the keys and values for the decoder are added.
    With label words, the decoder's first step follows the encoder.

    With `hidden_states`, the result also holds the output of encoder layer i as `hidden_states.{i}`. The
    output of the last layer is the input of the backbone's head. With `attentions`, it holds the attention
    of encoder layer i, (B, heads, N, N), as `attentions.{i}`.
    """
    options = {"output_hidden_states": True} if hidden_states else {}
    options |= {"output_attentions": True} if attentions else {}
    label_words = spec.head.label_words
    found = spec.encoder(model)(**inputs, **positions, **options)
    if label_words is None:
        result = {name: found[name] for name in spec.outputs}
    else:
        states, mask = found["last_hidden_state"], inputs["attention_mask"]
        result = {"logits": label_word_scores(model, states, mask, label_words)}
    if spec.head.generates:
        result |= cross_states(spec, model, found["last_hidden_state"])
    if hidden_states:
        # The first entry is the output of the embedding layer.
        layers = found["hidden_states"][1:]
        result |= {f"{HIDDEN_STATES_PREFIX}{layer}": hidden for layer, hidden in enumerate(layers)}
    if attentions:
        result |= {
            f"{ATTENTIONS_PREFIX}{layer}": found["attentions"][layer]
            for layer in range(len(found["attentions"]))
        }
    if pooling is not None:
        result["sentence_embedding"] = pooling(found["last_hidden_state"], inputs["attention_mask"])
    return result
