"""The layers of BERT, which many families copied: their sites, sizes and positions.

The second linear layer of the feed-forward network sits beside the residual and the layer norm.
"""

from typing import Any

import torch
from torch import Tensor, nn

from variator_export.model.encoder_size import EncoderSize
from variator_export.model.families.base import WrapFFN


def wrap_ffns(model: nn.Module, wrap: WrapFFN) -> None:
    """Every layer's two linear layers as one module, and nothing in the second one's place."""
    base: Any = model.base_model
    for index, layer in enumerate(base.encoder.layer):
        layer.intermediate = wrap(index, nn.Sequential(layer.intermediate, layer.output.dense))
        layer.output.dense = nn.Identity()


def size(config: Any) -> EncoderSize:
    """The sizes, as most families name them."""
    return EncoderSize(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        attention_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_ffn_matrices=2,
    )


def absolute_positions(input_ids: Tensor, config: Any) -> Tensor:
    """0, 1, 2, …, clamped to the last one: (1, N)."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return positions.clamp(max=config.max_position_embeddings - 1).unsqueeze(0)


def positions_beside_padding(input_ids: Tensor, config: Any, padding_idx: int) -> Tensor:
    """As fairseq counts them, (B, N): padding is at `padding_idx`, the rest counts from the next one."""
    keep = (input_ids != padding_idx).to(torch.int64)
    positions = torch.cumsum(keep, dim=1) * keep + padding_idx
    return positions.clamp(max=config.max_position_embeddings - 1)


def refuse_decoder(config: Any) -> str | None:
    """Layers that see only what came before, or a second sequence, are no encoder."""
    if config.is_decoder or config.add_cross_attention:
        return "it is a decoder (is_decoder or add_cross_attention is set)"
    return None
