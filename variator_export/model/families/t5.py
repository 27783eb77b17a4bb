"""T5 encoders, v1.0 (ReLU) and v1.1 (gated): the feed-forward network is one module."""

from typing import Any

from torch import nn

from variator_export.core.encoder_size import EncoderSize
from variator_export.model.families.base import FEATURES, Family, WrapFFN


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
        num_ffn_matrices=3 if config.is_gated_act else 2,
    )


T5 = Family(
    name="t5",
    heads={"T5EncoderModel": FEATURES},
    inputs=("input_ids", "attention_mask"),
    positions=None,
    stack="encoder.block",
    wrap_ffns=_wrap_ffns,
    size=_size,
    max_length=lambda _config: None,
    float32_modules=("wo",),
)
