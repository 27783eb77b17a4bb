"""BERT: the second linear layer of the feed-forward network sits beside the residual and the layer norm."""

from typing import Any

from torch import nn

from variator_export.core.encoder_size import EncoderSize
from variator_export.model.families.base import FEATURES, LOGITS, Family, Head, WrapFFN


def _wrap_ffns(model: nn.Module, wrap: WrapFFN) -> None:
    encoder: Any = model.get_submodule("bert" if hasattr(model, "bert") else "").encoder
    for index, layer in enumerate(encoder.layer):
        layer.intermediate = wrap(index, nn.Sequential(layer.intermediate, layer.output.dense))
        layer.output.dense = nn.Identity()


def _size(config: Any) -> EncoderSize:
    return EncoderSize(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        attention_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_ffn_matrices=2,
    )


BERT = Family(
    name="bert",
    heads={
        # No output needs the pooler.
        "BertModel": Head(FEATURES.outputs, FEATURES.token_outputs, {"add_pooling_layer": False}),
        "BertForSequenceClassification": LOGITS,
    },
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    has_position_ids=True,
    wrap_ffns=_wrap_ffns,
    size=_size,
    max_length=lambda config: config.max_position_embeddings,
)
