"""Sites, sizes and positions of BERT's layers, which many families have copied.

The second linear layer of the feed-forward network is in the same module as the residual and the layer norm.
"""

from typing import Any

import torch
from torch import Tensor, nn

from variator_export.core.encoder_size import EncoderSize
from variator_export.model.families.base import WrapFFN


def wrap_ffns(model: nn.Module, wrap: WrapFFN) -> None:
    """Combine the two linear layers of every layer into one module; an identity replaces the second one."""
    base: Any = model.base_model
    for index, layer in enumerate(base.encoder.layer):
        layer.intermediate = wrap(index, nn.Sequential(layer.intermediate, layer.output.dense))
        layer.output.dense = nn.Identity()


def size(config: Any) -> EncoderSize:
    """Sizes from a configuration with the usual field names."""
    return EncoderSize(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        attention_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_ffn_matrices=2,
    )


def absolute_positions(input_ids: Tensor, config: Any) -> Tensor:
    """Position ids 0, 1, 2, …, clamped to the last position: (1, N)."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return positions.clamp(max=config.max_position_embeddings - 1).unsqueeze(0)


def padding_aware_positions(input_ids: Tensor, config: Any, padding_idx: int) -> Tensor:
    """Position ids as in fairseq, (B, N): `padding_idx` for padding, other tokens count up from there."""
    keep = (input_ids != padding_idx).to(torch.int64)
    positions = torch.cumsum(keep, dim=1) * keep + padding_idx
    return positions.clamp(max=config.max_position_embeddings - 1)


def refuse_decoder(config: Any) -> str | None:
    """Refuse a decoder, whose layers see only earlier tokens or a second sequence."""
    if config.is_decoder or config.add_cross_attention:
        return "it is a decoder (is_decoder or add_cross_attention is set)"
    return None
