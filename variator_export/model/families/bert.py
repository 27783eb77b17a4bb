"""BERT."""

from variator_export.model.families import bert_layers
from variator_export.model.families.base import Family, encoder_heads

BERT = Family(
    name="bert",
    # No output needs the pooler.
    heads=encoder_heads("Bert", {"add_pooling_layer": False}),
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    positions=bert_layers.absolute_positions,
    stack="encoder.layer",
    wrap_ffns=bert_layers.wrap_ffns,
    size=bert_layers.size,
    max_length=lambda config: config.max_position_embeddings,
    refuse=bert_layers.refuse_decoder,
)
