"""RoBERTa and XLM-R: BERT's layers, with positions that skip padding and a single token type."""

from variator_export.model.families import bert_layers
from variator_export.model.families.base import Family, encoder_heads


def _family(name: str, prefix: str) -> Family:
    return Family(
        name=name,
        heads=encoder_heads(prefix, {"add_pooling_layer": False}),
        inputs=("input_ids", "attention_mask"),
        positions=lambda ids, config: bert_layers.padding_aware_positions(ids, config, config.pad_token_id),
        stack="encoder.layer",
        wrap_ffns=bert_layers.wrap_ffns,
        size=bert_layers.size,
        max_length=lambda config: config.max_position_embeddings - config.pad_token_id - 1,
        refuse=bert_layers.refuse_decoder,
    )


ROBERTA = _family("roberta", "Roberta")
XLM_ROBERTA = _family("xlm-roberta", "XLMRoberta")
