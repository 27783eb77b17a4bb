"""DistilBERT: the feed-forward network is one module, and the sizes have their own field names."""

from typing import Any

from torch import nn

from variator_export.core.encoder_size import EncoderSize
from variator_export.model.families.base import Family, WrapFFN, encoder_heads
from variator_export.model.families.bert_layers import absolute_positions


def _wrap_ffns(model: nn.Module, wrap: WrapFFN) -> None:
    base: Any = model.base_model
    for index, layer in enumerate(base.transformer.layer):
        layer.ffn = wrap(index, layer.ffn)


def _size(config: Any) -> EncoderSize:
    return EncoderSize(
        num_layers=config.n_layers,
        hidden_size=config.dim,
        attention_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_ffn_matrices=2,
    )


DISTILBERT = Family(
    name="distilbert",
    heads=encoder_heads("DistilBert"),
    inputs=("input_ids", "attention_mask"),
    positions=absolute_positions,
    stack="transformer.layer",
    wrap_ffns=_wrap_ffns,
    size=_size,
    max_length=lambda config: config.max_position_embeddings,
)
