"""Keys and values that a decoder reads of the encoder, computed once for each input."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from variator_export.core.axes import KINDS, present_name
from variator_export.model.families.base import Architecture


@dataclass(frozen=True)
class Projection:
    """The name of a linear layer, and the names of its tensors in the state dict."""

    module: str
    weight: str
    bias: str | None


def cross_projections(architecture: Architecture, model: nn.Module) -> list[tuple[Projection, Projection]]:
    """The linear layers that make keys and values for each decoder layer's cross-attention."""
    decoder = architecture.family.decoder
    assert decoder is not None
    names = {id(module): name for name, module in model.named_modules()}

    def describe(layer: nn.Module) -> Projection:
        name = names[id(layer)]
        has_bias = getattr(layer, "bias", None) is not None
        return Projection(name, f"{name}.weight", f"{name}.bias" if has_bias else None)

    pairs = map(decoder.cross_projections, decoder.layers(model))
    return [(describe(key), describe(value)) for key, value in pairs]


def cross_states(architecture: Architecture, model: Any, hidden: Tensor) -> dict[str, Tensor]:
    """Compute the keys and values of each decoder layer's cross-attention.

    Args:
        architecture: The model's architecture.
        model: The transformers model, with both stacks.
        hidden: The encoder's last hidden states, (B, N, d).

    Returns:
        (B, heads, N, head size) by name.
    """
    decoder = architecture.family.decoder
    assert decoder is not None
    size = decoder.size(model.config)
    found = {}
    for index, layer in enumerate(decoder.layers(model)):
        for kind, projection in zip(KINDS, decoder.cross_projections(layer), strict=True):
            heads = projection(hidden).view(*hidden.shape[:2], size.num_heads, size.head_size)
            found[present_name(index, "encoder", kind)] = heads.transpose(1, 2)
    return found
