"""The layers that a quantisation replaces, and what all quantised layers have in common."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# The least value that a scale is computed from, so that a vector of zeros does not divide by zero.
TINY = 1e-30


class GivenRounding:
    """Rounded values to use instead of a layer's own rounding, and the activations that they replaced.

    Args:
        values: The rounded values for each call of a layer, in order.
    """

    def __init__(self, values: Iterable[Tensor]) -> None:
        self._values = list(values)
        self.activations: list[Tensor] = []

    def take(self, scaled: Tensor) -> Tensor:
        """Return the rounded values for activations that are divided by their scale, (..., in)."""
        self.activations.append(scaled)
        return self._values[len(self.activations) - 1].to(scaled.dtype).reshape(scaled.shape)


class QuantizedLinear(nn.Module):
    """A linear layer with a quantised weight and quantised activations.

    Attributes:
        weight: The quantised weight (out, in).
        weight_scale: float (out,).
        bias: float (out,); None if the layer has none.
        given: Rounded activations to use instead of rounding, for verification. None to round.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.bias = bias
        self.given: GivenRounding | None = None


def linear_layers(model: Any, stack: str) -> dict[str, nn.Linear]:
    """The linear layers of a transformers model's encoder, by name. Those outside it, such as heads, are not.

    Args:
        model: The model.
        stack: Name of the module that holds the encoder layers, inside the base model.
    """
    layers: nn.Module = model.base_model.get_submodule(stack)
    found = layers.named_modules(prefix=stack)
    return {name: module for name, module in found if isinstance(module, nn.Linear)}


def is_part_of(name: str, part: str) -> bool:
    """Whether a dotted name contains another one: encoder.layer.5.output contains layer.5, not layer.50."""
    return f".{part}." in f".{name}."


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Replace modules wherever they are used.

    Args:
        model: The model, changed in place.
        replacements: The new modules by the `id` of the old ones.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])


def row_scales(weight: Tensor, largest: float) -> Tensor:
    """The scale of each row of a matrix, float32 (rows,), with which its largest value becomes `largest`."""
    return weight.float().abs().amax(dim=1).clamp_min(TINY) / largest


def to_int8(values: Tensor) -> Tensor:
    """Round to the nearest integers, halves to even."""
    return torch.round(values).to(torch.int8)
