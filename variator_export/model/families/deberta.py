"""DeBERTa, and DeBERTa-v2 and -v3 (one class): BERT's layers with disentangled attention."""

import dataclasses
from typing import Any

from variator_export.core.encoder_size import EncoderSize
from variator_export.model.families import bert_layers
from variator_export.model.families.base import Family, encoder_heads


def _size(config: Any) -> EncoderSize:
    return dataclasses.replace(
        bert_layers.size(config),
        relative_positions=_relative_positions(config),
        relative_positions_are_cut=int(config.model_type == "deberta"),
    )


def _relative_positions(config: Any) -> int:
    if not config.relative_attention:
        return 0
    buckets = getattr(config, "position_buckets", -1)
    distance = (
        config.max_relative_positions if config.max_relative_positions > 0 else config.max_position_embeddings
    )
    return 2 * (buckets if buckets > 0 else distance)


def _refuse(config: Any) -> str | None:
    # No released model has token types, and Optimum exports a model with token types without them.
    return "it has token types (type_vocab_size is not 0)" if config.type_vocab_size else None


def _refuse_assembly(config: Any) -> str | None:
    if getattr(config, "conv_kernel_size", 0):
        return "its encoder has a convolution after the first layer (conv_kernel_size)"
    return None


def _family(name: str, prefix: str) -> Family:
    return Family(
        name=name,
        heads=encoder_heads(prefix),
        inputs=("input_ids", "attention_mask"),
        positions=bert_layers.absolute_positions,
        stack="encoder.layer",
        wrap_ffns=bert_layers.wrap_ffns,
        size=_size,
        max_length=lambda config: config.max_position_embeddings,
        refuse=_refuse,
        refuse_assembly=_refuse_assembly,
        # The mask covers the rows of padding as well, and attention over nothing is spread over all tokens.
        padding_states_vary=True,
    )


DEBERTA = _family("deberta", "Deberta")
DEBERTA_V2 = _family("deberta-v2", "DebertaV2")
