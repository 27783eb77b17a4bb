"""T5 and mT5, v1.0 (ReLU) and v1.1 (gated): the feed-forward network is one module."""

from typing import Any

from torch import nn

from variator_export.core.encoder_size import DecoderSize, EncoderSize
from variator_export.model.families.base import FEATURES, TEXT_TO_TEXT, Decoder, Family, WrapFFN


def _wrap_ffns(model: nn.Module, wrap: WrapFFN) -> None:
    encoder: Any = model.get_submodule("encoder")
    for index, block in enumerate(encoder.block):
        feed_forward = block.layer[-1]
        feed_forward.DenseReluDense = wrap(index, feed_forward.DenseReluDense)


def _size(config: Any) -> EncoderSize:
    return EncoderSize(
        num_layers=config.num_layers,
        hidden_size=config.d_model,
        attention_size=config.num_heads * config.d_kv,
        intermediate_size=config.d_ff,
        num_ffn_matrices=_ffn_matrices(config),
    )


def _decoder_size(config: Any) -> DecoderSize:
    return DecoderSize(
        num_layers=config.num_decoder_layers,
        num_heads=config.num_heads,
        head_size=config.d_kv,
        intermediate_size=config.d_ff,
        num_ffn_matrices=_ffn_matrices(config),
        vocab_size=config.vocab_size,
    )


def _ffn_matrices(config: Any) -> int:
    return 3 if config.is_gated_act else 2


def _cross_projections(layer: Any) -> tuple[nn.Module, nn.Module]:
    attention = layer.layer[1].EncDecAttention
    return attention.k, attention.v


_POSITION_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"


def _share_position_bias(layer: Any, first: Any) -> None:
    attention, original = layer.layer[0].SelfAttention, first.layer[0].SelfAttention
    attention.has_relative_attention_bias = True
    attention.relative_attention_bias = original.relative_attention_bias


def _family(name: str, prefix: str) -> Family:
    return Family(
        name=name,
        heads={
            f"{prefix}EncoderModel": FEATURES,
            f"{prefix}ForConditionalGeneration": TEXT_TO_TEXT,
        },
        inputs=("input_ids", "attention_mask"),
        positions=None,
        stack="encoder.block",
        wrap_ffns=_wrap_ffns,
        size=_size,
        max_length=lambda _config: None,
        float32_modules=("wo",),
        first_layer_tensors=(_POSITION_BIAS,),
        share_first=_share_position_bias,
        decoder=Decoder(
            stack="decoder.block",
            cross_projections=_cross_projections,
            size=_decoder_size,
            max_length=lambda _config: None,
        ),
    )


T5, MT5 = _family("t5", "T5"), _family("mt5", "MT5")
