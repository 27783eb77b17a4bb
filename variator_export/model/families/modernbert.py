"""ModernBERT: a gated feed-forward network in one module, rotary positions, sliding windows of attention."""

import dataclasses
from typing import Any

from torch import nn

from variator_export.core.encoder_size import EncoderSize
from variator_export.model.families import bert_layers
from variator_export.model.families.base import Family, WrapFFN, encoder_heads


def _wrap_ffns(model: nn.Module, wrap: WrapFFN) -> None:
    base: Any = model.base_model
    for index, layer in enumerate(base.layers):
        layer.mlp = wrap(index, layer.mlp)


def _size(config: Any) -> EncoderSize:
    # `Wi` holds two matrices: one computes the gate and the other the gated value.
    return dataclasses.replace(bert_layers.size(config), num_ffn_matrices=3)


MODERNBERT = Family(
    name="modernbert",
    heads=encoder_heads("ModernBert"),
    inputs=("input_ids", "attention_mask"),
    positions=None,  # rotary positions have no last one
    stack="layers",
    wrap_ffns=_wrap_ffns,
    size=_size,
    max_length=lambda config: config.max_position_embeddings,
)
