"""Keys and values that a decoder reads of the encoder, computed once for each input."""

from typing import Any

from torch import Tensor

from variator_export.core.axes import KINDS, present_name, present_names
from variator_export.model.families.base import Architecture


def cross_outputs(architecture: Architecture, config: Any) -> tuple[str, ...]:
    """Names of the outputs of `cross_states`; none for a model that does not generate text."""
    if not architecture.head.generates:
        return ()
    assert architecture.family.decoder is not None
    return present_names(architecture.family.decoder.size(config).num_layers, "encoder")


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
