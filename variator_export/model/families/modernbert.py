"""ModernBERT: a gated feed-forward network in one module, rotary positions, sliding windows of attention."""

from typing import Any

from torch import nn

from variator_export.core.encoder_size import EncoderSize
from variator_export.model.families.base import Family, WrapFFN, encoder_heads


def _wrap_ffns(model: nn.Module, wrap: WrapFFN) -> None:
    base: Any = getattr(model, "model", model)
    for index, layer in enumerate(base.layers):
        layer.mlp = wrap(index, layer.mlp)


def _size(config: Any) -> EncoderSize:
    return EncoderSize(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        attention_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        # `Wi` makes the gate and what is gated at once.
        num_ffn_matrices=3,
    )


MODERNBERT = Family(
    name="modernbert",
    heads=encoder_heads("ModernBert"),
    inputs=("input_ids", "attention_mask"),
    positions=None,  # rotary: there is no last one
    wrap_ffns=_wrap_ffns,
    size=_size,
    max_length=lambda config: config.max_position_embeddings,
)
